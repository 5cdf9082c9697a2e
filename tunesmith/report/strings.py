"""The report's words in English and Chinese."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from tunesmith.errors import RecipeError, nearest
from tunesmith.report import measured_strings, training_strings
from tunesmith.report.data_words import GAP, WORDS_ZH, detail_in_chinese, environment_in_chinese

Language = Literal["en", "zh"]

_EN = {
    **measured_strings.EN,
    **training_strings.EN,
    "title": "What it cost, what it gained",
    "verdict": "Verdict",
    "not_measured": "not measured",
    "measured_on": "Measured on {device}",
    "random_weights": "Random weights: speed and memory only, not quality.",
    "memory": "Memory by owner",
    "memory_note": "Peak bytes that training itself holds, by what they are for.",
    "memory_note_cpu": (
        "Live tensor bytes at their peak, counted in a separate untimed pass, by what they are for. "
        "On so small a model this leads: torch itself outweighs it in the process's resident memory, shown below."
    ),
    "resident": "Resident memory of the process",
    "resident_note": (
        "High-water mark of the whole process: torch and its libraries included. It answers a different question "
        "than the bytes above, and is never mixed with them."
    ),
    "time": "Time per step",
    "time_note": "Median, warm-up left out; the line is the 95 % bootstrap interval.",
    "throughput": "Throughput",
    "throughput_note": "Tokens of the data in a step (no fillers) over the median time of a step, as beside this.",
    "losses": "Training loss",
    "losses_note": "Every step of the first repeat, warm-up included. All cells see the same data in the same order.",
    "frontier": "Memory against time",
    "frontier_note": (
        "Left and low is better. The line joins the cells that no other cell beats in both memory and time."
    ),
    "table": "Every cell",
    "cell": "cell",
    "step": "step",
    "tokens_per_s": "tokens/s",
    "peak": "peak allocated",
    "reserved": "reserved",
    "device": "device",
    "resident_short": "resident",
    "first_step": "first step",
    "total": "timed total",
    "epoch": "per epoch",
    "validation": "validation loss",
    "training": "training loss",
    "trainable": "trained",
    "status": "status",
    "ok": "ok",
    "failed": "failed",
    "out_of_memory": "out of memory",
    "timeout": "stopped: too long",
    "killed": "killed",
    "not_run": "not run",
    "unequal": "unequal work",
    "unequal_note": (
        "Cells marked “unequal work” processed other tokens or steps than the rest: their times can't be compared."
    ),
    "equal_note": "Every measured cell did the same work: {steps} steps, {tokens} tokens, {trained} of them trained.",
    "reproduce": "Reproduce each row",
    "copy": "Copy",
    "copied": "Copied",
    "environment": "Environment",
    "certificate": "Certificate",
    "certificate_note": "Checks that this run computes what it claims to.",
    "check": "check",
    "value": "value",
    "limit": "limit",
    "passed": "passed",
    "not_passed": "failed",
    "before_after_of": "Before and after: {name}",
    "answers_of": "Answers: {name}",
    "whose": "{name}: {text}",
    "answer": "answer",
    "question": "question",
    "expected": "expected",
    "before": "before",
    "after": "after",
    "accuracy": "exact answers",
    "shuffled": "with contexts shuffled",
    "perplexity": "perplexity",
    "training_run_of": "Training run: {name}",
    "steps_axis": "step",
    "loss_axis": "loss",
    "time_axis": "time per step",
    "memory_axis": "memory",
    "units": "1 GB = 10⁹ bytes, 1 GiB = 2³⁰ bytes.",
    "made_by": "Written by tunesmith {version} from the JSON of the run directories alone.",
    "weights": "weights",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "activations": "activations and the rest",
    "less_memory": "{x} less memory",
    "more_memory": "{x} more memory",
    "same_memory": "as much memory",
    "slower": "{x} slower",
    "much_slower": "{x}× the time",
    "faster": "{x} less time",
    "much_faster": "{x}× as fast",
    "same_time": "as fast within the noise",
    "unclear_time": "no difference in time that can be told from noise ({low} to {high}× the time)",
    "range": "{low} to {high}",
    "noisy": (
        "The times are noisy: a step of {label} took {time} at the median, with a 95 % interval from {low} to {high}. "
        "Differences of that size mean nothing: measure again on a machine that does nothing else."
    ),
    "loss_change": "loss {x}",
    "losses_differ": "validation loss {after} instead of {before}",
    "same_loss": "same loss",
    "sentence": "{label}: {parts}.",
    "on_top": "{gain} on top of {parent}: {parts}.",
    "useless": "{gain} on top of {parent} saved nothing ({parts}): skip it.",
    "against": "{label} against {parent}: {parts}.",
    "not_compared": "{label} did other work than the rest: it is not compared.",
    "did_not_run": "{label}: {status}.",
    "did_not_run_why": "{label}: {status} ({reason}).",
    "wins_both": "{label} is the fastest and needs the least memory ({memory}).",
    "wins_each": "{fast} is the fastest ({time} per step); {small} needs the least memory ({memory}).",
    "wins_tied": "{fast} are equally fast, within noise ({time} per step); {small} needs the least memory ({memory}).",
    "wins_unclear": (
        "Which of {fast} is the fastest can't be told from the noise ({time} per step); "
        "{small} needs the least memory ({memory})."
    ),
    "wins_time": "{fast} is the fastest ({time} per step).",
    "nothing": "No cell was measured.",
    "only_one": "{label}: {time} per step, {memory}.",
    "train_verdict": "{name}: validation loss {loss} after {steps} steps.",
    "train_verdict_plain": "{name}: training loss {loss} after {steps} steps.",
    "eval_verdict": "Exact answers went from {before} to {after} of {count} questions.",
    "eval_verdict_one": "{after} of {count} questions answered exactly.",
    "answers_shown": "{shown} of the {count} questions are shown, wrong answers first.",
    "ppl_verdict": "Perplexity went from {before} to {after}.",
    "comma": ", ",
    "and": ", ",
    "unit_gpus": "GPUs",
    "unit_processes": "CPU processes",
    "mode_weak": "weak",
    "mode_strong": "strong",
    "projected": "projected",
    "tokens_per_gpu": "tokens/s each",
    "of_ideal": "of ideal",
    "part_compute": "compute",
    "part_exposed": "exposed communication",
    "part_optimizer": "optimiser",
    "part_data": "data",
    "states": "model states each",
    "states_formula": "by formula",
    "states_difference": "difference",
    "scale_table": "Every number of processes",
    "scale_table_note": (
        "Weak: each keeps its part of a step. Strong: the step's batch stays. Ideal is the fewest's speed times their "
        "number. Model states are weights, gradients and optimiser states of the process with most; the difference is "
        "the worst of any process."
    ),
    "scale_curve": "Speed against size",
    "scale_curve_note": "Both axes double. The thin line is ideal; dashed and hollow is projected, not measured.",
    "scale_parts": "Where a step's time goes",
    "scale_parts_note": "Exposed: only communication ran on the device. Medians of the timed steps.",
    "scale_alone": "{gpus} {unit}: {tokens} tokens/s ({mode} scaling was not measured further).",
    "scale_verdict": (
        "{gpus} {unit}: {tokens} tokens/s, {ratio} of ideal against {fewest} ({mode} scaling). What limits: {what}."
    ),
    "limit_none": "nothing yet",
    "limit_communication": "communication that nothing hides, {lost} more of a step of {step}",
    "limit_stragglers": "waiting for the slowest process, {lost} more of a step of {step}",
    "limit_data": "waiting for data, {lost} more of a step of {step}",
    "limit_optimizer": "the optimiser, {lost} more of a step of {step}",
    "limit_host": "the host, which launches kernels too late, {lost} more of a step of {step}",
    "limit_compute": "computing itself, which takes longer, {lost} more of a step of {step}",
    "scale_states": "Model states of a process differ from the formula by {percent} at most.",
    "scale_projected": (
        "Projected: {gpus} {unit} on {nodes} nodes reach {tokens} tokens/s, {ratio} of ideal ({mode}). {hidden}; "
        "the model misses a measured step by {error} at most."
    ),
    "scale_hidden": "Computing hides {percent} of the communication",
    "scale_not_hidden": "Communication takes {x} times as long as its bytes alone",
    "scale_no_projection": "Nothing is projected: {reason}.",
}

_ZH = {
    **measured_strings.ZH,
    **training_strings.ZH,
    "title": "代价与收益",
    "verdict": "结论",
    "not_measured": "未测量",
    "measured_on": "测量设备：{device}",
    "random_weights": "随机权重：只反映速度和内存，不反映质量。",
    "memory": "按用途划分的内存",
    "memory_note": "训练自身占用的峰值字节，按用途划分。",
    "memory_note_cpu": (
        "张量存活字节的峰值，在单独的不计时运行中统计，按用途划分。"
        "模型这样小，以此图为主：在进程常驻内存（见下图）里，torch 本身比模型还大。"
    ),
    "resident": "进程常驻内存",
    "resident_note": "整个进程的最高水位，包括 torch 及其库。它与上图回答的是不同的问题，二者从不混用。",
    "time": "每步时间",
    "time_note": "中位数，不含预热；横线为 95 % 自助法区间。",
    "throughput": "吞吐量",
    "throughput_note": "每步的数据词元数（不计填充）除以每步时间的中位数（见旁边的图）。",
    "losses": "训练损失",
    "losses_note": "第一次重复的每一步，包括预热。所有单元以相同顺序看到相同数据。",
    "frontier": "内存与时间",
    "frontier_note": "越靠左、越靠下越好。连线上的单元在内存和时间上没有被其他单元同时超过。",
    "table": "所有单元",
    "cell": "单元",
    "step": "每步",
    "tokens_per_s": "词元/秒",
    "peak": "分配峰值",
    "reserved": "保留",
    "device": "设备",
    "resident_short": "常驻",
    "first_step": "首步",
    "total": "计时总长",
    "epoch": "每轮",
    "validation": "验证损失",
    "training": "训练损失",
    "trainable": "训练参数",
    "status": "状态",
    "ok": "成功",
    "failed": "失败",
    "out_of_memory": "内存不足",
    "timeout": "超时停止",
    "killed": "被终止",
    "not_run": "未运行",
    "unequal": "工作量不等",
    "unequal_note": "标有“工作量不等”的单元处理的词元或步数与其他单元不同，时间不可比较。",
    "equal_note": "所有测量单元的工作量相同：{steps} 步，{tokens} 个词元，其中训练 {trained} 个。",
    "reproduce": "复现每一行",
    "copy": "复制",
    "copied": "已复制",
    "environment": "环境",
    "certificate": "证书",
    "certificate_note": "检查本次运行确实计算了它所声称的内容。",
    "check": "检查",
    "value": "值",
    "limit": "上限",
    "passed": "通过",
    "not_passed": "未通过",
    "before_after_of": "训练前后：{name}",
    "answers_of": "回答：{name}",
    "whose": "{name}：{text}",
    "answer": "回答",
    "question": "问题",
    "expected": "期望",
    "before": "之前",
    "after": "之后",
    "accuracy": "完全正确率",
    "shuffled": "打乱上下文后",
    "perplexity": "困惑度",
    "training_run_of": "训练运行：{name}",
    "steps_axis": "步",
    "loss_axis": "损失",
    "time_axis": "每步时间",
    "memory_axis": "内存",
    "units": "1 GB = 10⁹ 字节，1 GiB = 2³⁰ 字节。",
    "made_by": "由 tunesmith {version} 仅根据运行目录中的 JSON 写成。",
    "weights": "权重",
    "adapters": "适配器",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活及其他",
    "less_memory": "内存减少 {x}",
    "more_memory": "内存增加 {x}",
    "same_memory": "内存相同",
    "slower": "慢 {x}",
    "much_slower": "用时为 {x} 倍",
    "faster": "用时减少 {x}",
    "much_faster": "速度为 {x} 倍",
    "same_time": "速度相同（在噪声范围内）",
    "unclear_time": "用时差别无法与噪声区分（为 {low} 至 {high} 倍）",
    "range": "{low} 至 {high}",
    "noisy": (
        "计时噪声很大：{label} 每步的中位数为 {time}，95 % 区间为 {low} 至 {high}。"
        "这样大小的差别没有意义：请在空闲的机器上重新测量。"
    ),
    "loss_change": "损失 {x}",
    "losses_differ": "验证损失 {after}（对比 {before}）",
    "same_loss": "损失相同",
    "sentence": "{label}：{parts}。",
    "on_top": "在 {parent} 上再加{gain}：{parts}。",
    "useless": "在 {parent} 上再加{gain}没有节省（{parts}）：不必使用。",
    "against": "{label} 与 {parent} 相比：{parts}。",
    "not_compared": "{label} 的工作量与其他单元不同，不作比较。",
    "did_not_run": "{label}：{status}。",
    "did_not_run_why": "{label}：{status}（{reason}）。",
    "wins_both": "{label} 最快，内存也最少（{memory}）。",
    "wins_each": "{fast} 最快（每步 {time}）；{small} 内存最少（{memory}）。",
    "wins_tied": "{fast} 最快，差别在噪声之内（每步 {time}）；{small} 占用内存最少（{memory}）。",
    "wins_unclear": "{fast} 中谁最快，在噪声中无法分辨（每步 {time}）；{small} 占用内存最少（{memory}）。",
    "wins_time": "{fast} 最快（每步 {time}）。",
    "nothing": "没有测到任何单元。",
    "only_one": "{label}：每步 {time}，{memory}。",
    "train_verdict": "{name}：{steps} 步后验证损失 {loss}。",
    "train_verdict_plain": "{name}：{steps} 步后训练损失 {loss}。",
    "eval_verdict": "{count} 个问题中完全答对的从 {before} 变为 {after}。",
    "eval_verdict_one": "{count} 个问题中完全答对 {after}。",
    "answers_shown": "显示 {count} 个问题中的 {shown} 个，答错的在前。",
    "ppl_verdict": "困惑度从 {before} 变为 {after}。",
    "comma": "，",
    "and": "、",
    "unit_gpus": "GPU 数",
    "unit_processes": "CPU 进程数",
    "mode_weak": "弱扩展",
    "mode_strong": "强扩展",
    "projected": "推算",
    "tokens_per_gpu": "每个词元/秒",
    "of_ideal": "占理想",
    "part_compute": "计算",
    "part_exposed": "未隐藏的通信",
    "part_optimizer": "优化器",
    "part_data": "数据",
    "states": "每个的模型状态",
    "states_formula": "按公式",
    "states_difference": "差异",
    "scale_table": "各进程数",
    "scale_table_note": (
        "弱扩展：每个进程保持自己的份额。强扩展：每步的批量不变。理想值为最少进程数的速度乘以倍数。"
        "模型状态为占用最多的进程的权重、梯度和优化器状态；差异为所有进程中最大的。"
    ),
    "scale_curve": "速度与规模",
    "scale_curve_note": "两轴均按倍增。细线为理想值；虚线和空心点为推算，并非测量。",
    "scale_parts": "每步时间的去向",
    "scale_parts_note": "未隐藏：设备上只有通信在运行。取计时步的中位数。",
    "scale_alone": "{unit} {gpus}：每秒 {tokens} 词元（{mode}未继续测量）。",
    "scale_verdict": (
        "{unit} {gpus}：每秒 {tokens} 词元，为理想值（以 {fewest} 为基准）的 {ratio}（{mode}）。瓶颈：{what}。"
    ),
    "limit_none": "尚无",
    "limit_communication": "未隐藏的通信，在 {step} 的一步中多用 {lost}",
    "limit_stragglers": "等待最慢的进程，在 {step} 的一步中多用 {lost}",
    "limit_data": "等待数据，在 {step} 的一步中多用 {lost}",
    "limit_optimizer": "优化器，在 {step} 的一步中多用 {lost}",
    "limit_host": "主机启动内核太慢，在 {step} 的一步中多用 {lost}",
    "limit_compute": "计算本身变慢，在 {step} 的一步中多用 {lost}",
    "scale_states": "每个进程的模型状态与公式最多相差 {percent}。",
    "scale_projected": (
        "推算：{nodes} 个节点、{unit} {gpus}，可达每秒 {tokens} 词元，为理想值的 {ratio}（{mode}）。"
        "{hidden}；模型与测得的每步最多相差 {error}。"
    ),
    "scale_hidden": "计算隐藏了 {percent} 的通信",
    "scale_not_hidden": "通信用时为其字节传输时间的 {x} 倍",
    "scale_no_projection": "没有推算：{reason}。",
}


@dataclass(frozen=True)
class Words:
    """The strings of one language: `words("key", name=value)`."""

    language: Language = "en"

    def __call__(self, key: str, **values: object) -> str:
        if self.language == "en":
            return _EN[key].format(**values)
        return GAP.sub("", _ZH[key].format(**values))

    def data(self, text: str) -> str:
        """A word that came from the data, translated part by part where it is known."""
        if self.language == "en":
            return text
        return " + ".join(WORDS_ZH.get(part, part) for part in text.split(" + "))

    def detail(self, text: str) -> str:
        """The detail of a certificate's check."""
        return text if self.language == "en" else detail_in_chinese(text)

    def environment(self, name: str, text: str) -> tuple[str, str]:
        """A name and a value of the environment."""
        return (name, text) if self.language == "en" else environment_in_chinese(name, text)

    def status(self, status: str) -> str:
        """The status of a cell in words; one that is not known stays as it is."""
        key = status.replace(" ", "_")
        return self(key) if key in ("ok", "failed", "out_of_memory", "timeout", "killed", "not_run") else status


def words_for(language: str) -> Words:
    """The strings of `language`; "auto": of the environment's locale, English where it is neither.

    Raises: RecipeError for a language that is not there.
    """
    if language == "auto":
        locales = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        return Words("zh" if next(filter(None, locales), "").lower().startswith("zh") else "en")
    if language not in ("en", "zh"):
        raise RecipeError(f"report language {language!r} is not one of auto, en, zh{nearest(language, ('en', 'zh'))}")
    return Words("zh" if language == "zh" else "en")
