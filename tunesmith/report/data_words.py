"""Chinese for what run directories hold in English: details of a certificate's checks, the environment's names.

A detail is put together from known pieces with numbers between them; a piece that is not known stays as it is.
"""

from __future__ import annotations

import re

CHECKS_ZH = {
    "mask shown": "展示掩码",
    "accumulation invariance": "梯度累积不变",
    "packing isolation": "打包隔离",
    "blocks written out": "展开的层与逐算子一致",
    "kernel: RMS norm": "算子：RMS 归一化",
    "kernel: layer norm": "算子：层归一化",
    "kernel: rope": "算子：旋转位置编码",
    "kernel: attention": "算子：注意力",
    "kernel: chunked loss": "算子：分块损失",
    "kernel: LoRA linear": "算子：LoRA 线性层",
    "kernel: NF4 linear": "算子：NF4 线性层",
    "kernel: NF4 quantise": "算子：NF4 量化",
    "kernel: NF4 dequantise": "算子：NF4 反量化",
    "kernel: fp8 products": "算子：fp8 乘积",
    "kernel: 8-bit AdamW": "算子：8 位 AdamW",
    "kernel: expert routing": "算子：专家路由",
    "merge parity": "合并前后一致",
    "resume equality": "续训一致",
}
"""The names of a certificate's checks."""

WORDS_ZH = {
    "checkpointing": "梯度检查点",
    "full": "全参数",
    "mixed precision": "混合精度",
    "linear": "线性",
    "cosine": "余弦",
    "constant": "恒定",
    "forward": "前向",
    "loss and backward": "损失与反向",
    "optimiser": "优化器",
    **CHECKS_ZH,
}
"""Words that runs write into their JSON: gains of a matrix, schedules, checks."""

_ENVIRONMENT_ZH = {
    "platform": "平台",
    "packages": "软件包",
    "name": "名称",
    "cores": "核数",
    "usable_cores": "可用核数",
    "memory": "内存",
    "chip": "芯片",
    "model": "模型",
    "weights": "权重",
    "checkpoint": "检查点",
    "random": "随机",
    "omp_num_threads": "OMP 线程数",
    "cuda_allocator": "CUDA 分配器",
    "host_allocator": "主机分配器",
    "driver": "驱动",
    "commit": "提交",
    "dirty": "有未提交的改动",
    "True": "是",
    "False": "否",
}

_DETAILS_ZH = tuple(
    (re.compile(pattern), chinese)
    for pattern, chinese in (
        (
            r"(\d+) of (\d+) tokens of the first (\d+) documents are trained, ends of turns among them "
            r"\(value: the share\)",
            r"前 \3 个文档的 \2 个词元中训练 \1 个，含回合结束符（值为其比例）",
        ),
        (r"random tokens: all but the first of a document are trained", "随机词元：文档中除第一个外全部训练"),
        (
            r"gradients of the same documents in (\w+) \((.*)\) on (.*)",
            r"同样的文档在 \1 下的梯度（\2），\3",
        ),
        (r"hidden states in (\w+) when all neighbours are exchanged, on (.*)", r"换掉所有相邻文档后 \1 的隐藏状态，\2"),
        (r"written out and as CUDA graphs against operator by operator on ", "展开并录成 CUDA 图，与逐算子相比，"),
        (r"written out against operator by operator on ", "展开的层与逐算子相比，"),
        (r"relative difference of logits, merged into the base, on ", "并入底座后 logits 的相对差，"),
        (r"relative difference of logits, merged into the dequantised base, on ", "并入反量化底座后 logits 的相对差，"),
        (
            r"losses and weights after (\d+) steps of (\w+), saved and loaded after (\d+), on ",
            r"\2 \1 步之后的损失和权重，在第 \3 步保存并载入，",
        ),
        (
            r"the same architecture with (\d+) layers, hidden (\d+), vocabulary (\d+), random weights",
            r"同样的结构：\1 层，隐藏维度 \2，词表 \3，随机权重",
        ),
        (r"the same architecture with (\d+) layers, random weights", r"同样的结构：\1 层，随机权重"),
        (r"the recipe's model, random", "配方的模型，随机权重"),
        (r"the recipe's model", "配方的模型"),
        (
            r"one micro-batch; two; one per document; padded, the last one ragged",
            "一个微批次；两个；每个文档一个；填充，最后一个不满",
        ),
        (r"relative error (\S+) in (\w+), as a multiple of torch's; ", r"\2 的相对误差 \1，以 torch 误差的倍数计；"),
        (r"relative error of the larger of both products, ", "两个乘积中较大的相对误差，"),
        (r"relative error of the largest of three products, ", "三个乘积中最大的相对误差，"),
        (r"largest difference between kernel and reference, ", "算子与参照的最大差，"),
        (
            r"distance beyond the nearest code, as a multiple of what rounding explains, (.*), "
            r"(plain|doubly quantised)",
            r"超出最近编码的距离，以舍入所能解释的倍数计，\1，\2",
        ),
        (
            r"(\d+) updates of (\d+) weights against torch's, as a multiple of what rounding explains",
            r"\2 个权重更新 \1 次，与 torch 相比，以舍入所能解释的倍数计",
        ),
        (r"doubly quantised", "双重量化"),
        (r"plain$", "单重量化"),
        (r"(\d+) trained of (\d+) tokens, (\d+) words, chunks of (\d+)", r"\2 个词元中训练 \1 个，词表 \3，每块 \4"),
        (r"documents of ([\d, ]+) tokens, (\d+) heads", r"文档长 \1 词元，\2 个头"),
        (r"(\d+) positions, (\d+) heads", r"\1 个位置，\2 个头"),
        (r"(\d+) tokens, (\d+) of (\d+) experts, hidden (\d+)", r"\1 个词元，\3 个专家取 \2 个，隐藏维度 \4"),
        (r"(\d+) tokens, hidden (\d+)", r"\1 个词元，隐藏维度 \2"),
        (r", window (\d+)", r"，窗口 \1"),
        (r"rank (\d+), ", r"秩 \1，"),
    )
)


GAP = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])")
"""A space between two Chinese characters, which is one too many."""


def detail_in_chinese(text: str) -> str:
    """The detail of a check, its known pieces in Chinese."""
    for pattern, chinese in _DETAILS_ZH:
        text = pattern.sub(chinese, text)
    return text


def environment_in_chinese(name: str, text: str) -> tuple[str, str]:
    """A name of the environment, part by part, and its value where that is a word."""
    parts = [_ENVIRONMENT_ZH.get(part, part) for part in name.split(" · ")]
    return " · ".join(parts), _ENVIRONMENT_ZH.get(text, text)
