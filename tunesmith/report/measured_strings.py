"""The report's words for serving and inference runs, in English and Chinese."""

from __future__ import annotations

EN = {
    "serve_table": "Every load",
    "serve_table_note": (
        "Latencies count from when a request was due, whether or not it could be sent. TTFT: to the first content. "
        "TPOT: per token after the first. ITL: between chunks. E2E: to the end. Percentiles are nearest-rank values."
    ),
    "good_note": "Good: {objectives}, and no error.",
    "server": "server",
    "load": "load",
    "requests_per_s": "requests/s",
    "output_per_s": "output tokens/s",
    "good": "good",
    "errors": "errors",
    "client_limit": "the client was the limit",
    "load_open": "{value} requests/s",
    "load_all": "all at once",
    "load_closed": "{value} in flight",
    "load_trace": "trace at {value}×",
    "axis_open": "requests a second",
    "axis_closed": "requests in flight",
    "axis_trace": "times the trace's speed",
    "serve_ttft": "Time to the first token",
    "serve_tpot": "Time per token after it",
    "serve_latency_note": "Median, and dashed the 99th percentile. Loads stand side by side; the scale is logarithmic.",
    "serve_tokens": "Output tokens a second",
    "serve_tokens_note": "Of answers that came to their end, over the whole load with its tail.",
    "serve_good": "Goodput",
    "serve_carried": "{server}: {ratio} of answers are good at {load}, {rate} good answers a second.",
    "serve_good_note": "Answers a second that met every objective.",
    "serve_none_good": "{server}: at no load were {percent} of answers good.",
    "serve_best": "{server}: {tokens} output tokens/s ({load}); TTFT {ttft}, p99 {ttft99}; {tpot} a token.",
    "serve_against": (
        "{server} against {other} ({load}): {tokens}× the output tokens/s, {ttft}× the TTFT, {ttft99}× at p99, "
        "{tpot}× the time per token."
    ),
    "serve_saturated": "{server}, {load}: this may have measured the client rather than the server: {why}.",
    "serve_errors": "{server}, {load}: {count} requests failed, {most} of them so: {text}",
    "infer_table": "Engines and weight formats",
    "infer_table_note": (
        "Every engine in processes of its own, in turn; medians over the rounds. In brackets: how many times as fast "
        "tunesmith is with the same weights. A row that was not measured says why."
    ),
    "infer_output": "Throughput",
    "infer_output_note": "Output tokens a second, many requests at once.",
    "infer_token": "Time per token, one request",
    "infer_token_note": "After the first token; lower is better.",
    "infer_best": "{what}: tunesmith {value}, {other} {other_value}: {ratio}× as fast.",
    "infer_alone": "{what}: tunesmith {value}.",
    "infer_failed": "{engine} {format}: {status}: {reason}",
    "infer_busy": "The machine was busy: load {load} on {cores} cores before the run. The numbers are only indicative.",
    "infer_unequal": "{engine} {format} gave other tokens than asked for: {reason}",
    "engine": "engine",
    "format": "weights",
    "total_per_s": "total tokens/s",
    "batch_n": "batch {n}, output tokens/s",
    "ttft_one": "TTFT, one request",
    "per_token": "per token, one request",
    "prefill": "prefill, tokens/s",
    "first_token": "command to first token",
    "weights_bytes": "weights",
    "peak_device": "peak memory",
    "ours_is": "ours is",
}

ZH = {
    "serve_table": "各负载",
    "serve_table_note": (
        "延迟从请求应发出的时刻算起，无论当时能否发出。TTFT：到首个内容；TPOT：其后每个词元；ITL：两段之间；"
        "E2E：到结束。百分位取最近秩的实测值。"
    ),
    "good_note": "达标：{objectives}，且无错误。",
    "server": "服务器",
    "load": "负载",
    "requests_per_s": "请求/秒",
    "output_per_s": "输出词元/秒",
    "good": "达标",
    "errors": "错误",
    "client_limit": "客户端成为瓶颈",
    "load_open": "每秒 {value} 个请求",
    "load_all": "全部同时",
    "load_closed": "并发 {value}",
    "load_trace": "轨迹 {value} 倍速",
    "axis_open": "每秒请求数",
    "axis_closed": "并发请求数",
    "axis_trace": "轨迹速度倍数",
    "serve_ttft": "首词元时间",
    "serve_tpot": "其后每词元时间",
    "serve_latency_note": "中位数；虚线为第 99 百分位。负载等距排列，纵轴为对数。",
    "serve_tokens": "每秒输出词元",
    "serve_tokens_note": "完整结束的回答，按整个负载（含尾部）计。",
    "serve_good": "有效吞吐",
    "serve_carried": "{server}：{load}时 {ratio} 的回答达标，每秒 {rate} 个达标回答。",
    "serve_good_note": "每秒满足全部目标的回答数。",
    "serve_none_good": "{server}：没有任何负载使 {percent} 的回答达标。",
    "serve_best": "{server}：每秒 {tokens} 输出词元（{load}）；TTFT {ttft}，p99 {ttft99}；每词元 {tpot}。",
    "serve_against": (
        "{server} 对比 {other}（{load}）：输出词元/秒为 {tokens} 倍，TTFT 为 {ttft} 倍，p99 为 {ttft99} 倍，"
        "每词元时间为 {tpot} 倍。"
    ),
    "serve_saturated": "{server}，{load}：此处测到的可能是客户端而非服务器：{why}。",
    "serve_errors": "{server}，{load}：{count} 个请求失败，其中 {most} 个：{text}",
    "infer_table": "各引擎与权重格式",
    "infer_table_note": (
        "每个引擎在自己的进程中轮流运行；取各轮中位数。括号内为相同权重格式下 tunesmith 的速度倍数。"
        "未测量的行说明原因。"
    ),
    "infer_output": "吞吐量",
    "infer_output_note": "许多请求同时进行时每秒输出词元。",
    "infer_token": "单请求每词元时间",
    "infer_token_note": "首词元之后；越低越好。",
    "infer_best": "{what}：tunesmith {value}，{other} {other_value}：速度为其 {ratio} 倍。",
    "infer_alone": "{what}：tunesmith {value}。",
    "infer_failed": "{engine} {format}：{status}：{reason}",
    "infer_busy": "机器正忙：运行前 {cores} 核负载 {load}。数字仅供参考。",
    "infer_unequal": "{engine} {format} 给出的词元数与要求不同：{reason}",
    "engine": "引擎",
    "format": "权重",
    "total_per_s": "总词元/秒",
    "batch_n": "批量 {n}，输出词元/秒",
    "ttft_one": "单请求 TTFT",
    "per_token": "单请求每词元",
    "prefill": "预填充，词元/秒",
    "first_token": "命令到首词元",
    "weights_bytes": "权重",
    "peak_device": "峰值内存",
    "ours_is": "我们是其",
}
