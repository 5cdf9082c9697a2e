"""The report's words for single training runs and evaluations, in English and Chinese."""

from __future__ import annotations

EN = {
    "run_method": "method",
    "run_model": "model",
    "run_data": "data",
    "run_length": "length",
    "run_learning_rate": "learning rate",
    "run_throughput": "speed",
    "run_peak": "peak memory of the GPU",
    "run_resident": "memory of the process",
    "run_duration": "time to train",
    "run_rank": "{method}, rank {rank}",
    "run_share": "{trained} of {total} parameters trained",
    "run_with": "{text} ({more})",
    "run_steps": "{steps} steps",
    "run_epochs": "{epochs} epochs",
    "run_speed": "{tokens} tokens/s (median)",
    "run_command": "The command of this run",
    "evaluation_of": "Evaluation: {name}",
    "ppl_verdict_one": "Perplexity {after} on {data}.",
}

ZH = {
    "run_method": "方法",
    "run_model": "模型",
    "run_data": "数据",
    "run_length": "长度",
    "run_learning_rate": "学习率",
    "run_throughput": "速度",
    "run_peak": "显存峰值",
    "run_resident": "进程内存",
    "run_duration": "训练用时",
    "run_rank": "{method}，秩 {rank}",
    "run_share": "共 {total} 参数，训练 {trained}",
    "run_with": "{text}（{more}）",
    "run_steps": "{steps} 步",
    "run_epochs": "{epochs} 轮",
    "run_speed": "{tokens} 词元/秒（中位数）",
    "run_command": "本次运行的命令",
    "evaluation_of": "评测：{name}",
    "ppl_verdict_one": "在 {data} 上的困惑度为 {after}。",
}
