"""Names and values, drawn for a split; every string belongs to exactly one split.

The split is a hash of the string itself, so a value of the held-out split can be drawn neither in pre-training nor in
fine-tuning, whatever the seed. Made-up names are moreover put together from syllables that belong to the split.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Literal, TypeVar

Split = Literal["pretrain", "train", "validation", "heldout"]
Language = Literal["en", "zh"]
Maker = Callable[[Random, Split], str]
Item = TypeVar("Item")

_BUCKETS: tuple[Split, ...] = ("pretrain",) * 7 + ("train", "validation", "heldout")


def words(text: str, separator: str | None = None) -> tuple[str, ...]:
    """The words of a text, split at spaces or at `separator`."""
    return tuple(text.split(separator))


ONSETS = words("b br c ch d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk st t th tr v vr w y z zh")
VOWELS = words("a e i o u ai ea ie oo ou y")
CODAS = ("", *words("n l r s m k t nd rk lm x"))

COLOURS = words(
    "red blue green yellow orange purple pink brown grey black white teal ivory crimson violet silver gold beige "
    "cyan amber olive coral indigo cream navy scarlet mint rust lilac bronze"
)
SHADES = words("pale dark smoky bright dusty deep soft warm cool matte glossy faded misty sandy stormy frosted")
MATERIALS = words(
    "walnut oak steel glass cotton wool linen leather bamboo clay copper marble silk cork slate brass felt granite "
    "birch porcelain canvas iron pine velvet"
)
FINISHES = words("brushed polished woven recycled carved painted raw smooth braided lacquered pressed hammered oiled")
MOTIFS = words("lion moon river leaf star wave fox crane tower rose wolf cloud pine shell comet harp acorn heron")
UNITS = words(
    "cm mm kg g litres watts volts hours days pieces metres pages minutes weeks months years grams inches points "
    "boxes seats steps bytes degrees rooms"
)
MONTHS = words("January February March April May June July August September October November December")
PRODUCTS = words(
    "lamp kettle chair table clock bag mug jacket tent bottle camera radio carpet pillow bicycle speaker blanket vase "
    "drum mirror desk shelf toaster helmet umbrella wallet watch candle basket notebook"
)

_COMMON_HAN = (
    "安白百宝北本春达大丹德灯东冬豆方飞风福刚高谷光广贵国果海汉好禾和河恒红华欢辉火吉佳建江金锦京晶静久"
    "开康可克兰朗乐雷力丽利莲良林灵龙露绿伦罗马满美蒙米妙民明木南宁牛欧派平奇千巧青清秋泉荣如瑞润三森"
    "沙山尚生胜诗石时世双水思松泰唐桃特天田铁通同万旺微维文沃西希夏仙香祥小心新星兴雪雅延阳洋叶一逸音银"
    "英永优友宇玉元园原远月云运泽真正志智中竹子紫自宗祖尊左之芝知"
)
ZH_COLOURS = words("红 蓝 绿 黄 橙 紫 粉 棕 灰 黑 白 青 米 银 金 褐 靛 杏 咖啡 墨绿 天蓝 玫红 酒红 橄榄")
ZH_SHADES = words("浅 深 淡 亮 暗 雾面 哑光 柔和的 鲜艳的 复古 冷调 暖调")
ZH_MATERIALS = words(
    "胡桃木 橡木 不锈钢 玻璃 棉布 羊毛 亚麻 皮革 竹子 陶瓷 铜 大理石 丝绸 软木 石板 帆布 松木 铝合金 瓷 藤"
)
ZH_FINISHES = words("磨砂 抛光 手工 再生 雕花 编织 烤漆 天然 加厚 压纹 仿古 双层")
ZH_MOTIFS = words("狮子 月亮 河流 树叶 星星 海浪 狐狸 仙鹤 高塔 玫瑰 云朵 贝壳 松树 蝴蝶 鲤鱼 梅花")
ZH_UNITS = words("厘米 毫米 公斤 克 升 瓦 伏 小时 天 件 米 页 分钟 周 个月 年 寸 分 盒 座 步 度 间")
ZH_PRODUCTS = words(
    "台灯 水壶 椅子 桌子 时钟 背包 杯子 外套 帐篷 水瓶 相机 收音机 地毯 枕头 自行车 音箱 毯子 花瓶 鼓 镜子 书架 "
    "烤箱 头盔 雨伞 钱包 手表 蜡烛 篮子 笔记本 风扇"
)
# Made-up names that would say something rude are drawn again.
_RUDE = words(
    "shit fuck fuk cunt dick cock tit ass nig nazi fag cum piss rape slut poo prick whor porn sex kil jew fart damn"
)
_RUDE_HAN = frozenset(
    "死尸屎尿屁奸淫妓嫖娼操鬼杀毒奴贱逼枪炸党习毛邓江泽胡温骂狗猪痔癌嫌尻胸乳臀阴肛杂种蠢笨傻疯痴滚妈丧葬坟棺邪"
)
SURNAMES = "王李张刘陈杨黄赵吴周徐孙马朱胡郭何高林罗"


COMMON_HAN = "".join(one for one in _COMMON_HAN if one not in _RUDE_HAN)


def split_of(text: str) -> Split:
    """The one split that a string belongs to (seven in ten: pretrain)."""
    return _BUCKETS[zlib.crc32(text.casefold().encode()) % 10]


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """One of `items`, all equally likely."""
    return items[int(rng.random() * len(items))]


def belonging(make: Callable[[Random], str]) -> Maker:
    """A maker that draws from `make` until the string belongs to the split asked for."""

    def draw(rng: Random, split: Split) -> str:
        while True:
            text = make(rng)
            if split_of(text) == split:
                return text

    return draw


@cache
def syllables(split: Split) -> tuple[str, ...]:
    """The syllables that made-up names of a split are put together from."""
    every = (onset + vowel + coda for onset in ONSETS for vowel in VOWELS for coda in CODAS)
    return tuple(s for s in every if split_of(s) == split)


@cache
def common_han() -> str:
    """The Chinese characters of GB 2312's first level that names are made of, in its order."""
    rows = (bytes([row, column]) for row in range(0xB0, 0xD8) for column in range(0xA1, 0xFF))
    characters = (code.decode("gb2312", errors="ignore") for code in rows)
    return "".join(one for one in characters if one not in _RUDE_HAN)


def _han(rng: Random) -> str:
    return pick(rng, COMMON_HAN) if rng.random() < 0.7 else pick(rng, common_han())


def _syllabic(rng: Random, split: Split) -> str:
    pool = syllables(split)
    word = pick(rng, pool) + pick(rng, pool)
    return word + pick(rng, pool) if rng.random() < 0.25 else word


def made_up(rng: Random, split: Split) -> str:
    """A made-up lower-case word of two or three syllables."""
    while True:
        word = _syllabic(rng, split)
        if split_of(word) == split and not any(rude in word for rude in _RUDE):
            return word


def name(rng: Random, split: Split) -> str:
    """A made-up capitalised name."""
    return made_up(rng, split).capitalize()


def _zh_made_up(rng: Random, split: Split, first: Callable[[Random], str], long_ratio: float) -> str:
    """Two or three characters. Outside pre-training always three: a shorter name would turn up inside longer ones."""
    while True:
        word = first(rng) + _han(rng)
        word = word + _han(rng) if split != "pretrain" or rng.random() < long_ratio else word
        if split_of(word) == split:
            return word


def zh_name(rng: Random, split: Split) -> str:
    """A made-up Chinese name of two or three characters."""
    return _zh_made_up(rng, split, _han, 0.35)


def _number(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.5:
        return str(2 + int(rng.random() * 98))
    if draw < 0.8:
        return str(100 + int(rng.random() * 900))
    if draw < 0.9:
        return str(1000 + int(rng.random() * 9000))
    return f"{1 + int(rng.random() * 30)}.{1 + int(rng.random() * 9)}"


def _price(rng: Random) -> str:
    whole = 2 + int(rng.random() * (98 if rng.random() < 0.6 else 900))
    draw = rng.random()
    if draw < 0.35:
        return f"${whole}.{int(rng.random() * 100):02d}"
    if draw < 0.55:
        return f"£{whole}.{int(rng.random() * 100):02d}"
    return f"{whole} {pick(rng, ('euros', 'dollars', 'crowns', 'coins'))}"


_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_PATTERNS = ("LL-DDDD", "LDLD", "L-DD", "LLL-DDD", "DDLLD", "LLDDD", "D-LL-D", "LLLL", "LDDDDL", "DDDD-L", "LL.DD.L")


def _code(rng: Random) -> str:
    letters, pattern = _LETTERS, pick(rng, _PATTERNS)
    random = rng.random
    return "".join(
        letters[int(random() * 24)] if c == "L" else str(int(random() * 10)) if c == "D" else c for c in pattern
    )


def _date(rng: Random) -> str:
    day, month, year = 1 + int(rng.random() * 28), int(rng.random() * 12), 1950 + int(rng.random() * 100)
    draw = rng.random()
    if draw < 0.4:
        return f"{day} {MONTHS[month]} {year}"
    if draw < 0.7:
        return f"{MONTHS[month]} {day}, {year}"
    return f"{year}-{month + 1:02d}-{day:02d}"


def _zh_date(rng: Random) -> str:
    day, month, year = 1 + int(rng.random() * 28), 1 + int(rng.random() * 12), 1950 + int(rng.random() * 100)
    return f"{year}年{month}月{day}日" if rng.random() < 0.8 else f"{year}年{month}月"


def _time(rng: Random) -> str:
    return f"{int(rng.random() * 24)}:{int(rng.random() * 60):02d}"


def _place(rng: Random, split: Split) -> str:
    word, draw = name(rng, split), rng.random()
    if draw < 0.5:
        return word
    if draw < 0.75:
        return f"{pick(rng, ('Port', 'New', 'Lake', 'Upper', 'Saint'))} {word}"
    return f"{word} {pick(rng, ('Street', 'Valley', 'Bay', 'Hill', 'Square'))}"


def _person(rng: Random, split: Split) -> str:
    return f"{name(rng, split)} {name(rng, split)}" if rng.random() < 0.7 else name(rng, split)


def _zh_place(rng: Random, split: Split) -> str:
    return zh_name(rng, split) + pick(rng, ("市", "县", "镇", "村", "街", "港", "山", "湖"))


def _zh_person(rng: Random, split: Split) -> str:
    return _zh_made_up(rng, split, lambda rng: pick(rng, SURNAMES), 0.6)


def _size(rng: Random) -> str:
    """Without a unit: '12 x 30 cm' would hold the measure '30 cm', which may be of another split."""
    return f"{2 + int(rng.random() * 98)} x {2 + int(rng.random() * 98)}"


VALUES: dict[Language, dict[str, Maker]] = {
    "en": {
        "measure": belonging(lambda rng: f"{_number(rng)} {pick(rng, UNITS)}"),
        "weight": belonging(lambda rng: f"{_number(rng)} {pick(rng, ('kg', 'g', 'grams'))}"),
        "price": belonging(_price),
        "code": belonging(_code),
        "colour": belonging(lambda rng: f"{pick(rng, SHADES)} {pick(rng, COLOURS)}"),
        "material": belonging(lambda rng: f"{pick(rng, FINISHES)} {pick(rng, MATERIALS)}"),
        "motif": belonging(lambda rng: f"{pick(rng, COLOURS)} {pick(rng, MOTIFS)}"),
        "date": belonging(_date),
        "time": belonging(_time),
        "size": belonging(_size),
        "place": _place,
        "person": _person,
        "word": made_up,
    },
    "zh": {
        "measure": belonging(lambda rng: f"{_number(rng)}{pick(rng, ZH_UNITS)}"),
        "weight": belonging(lambda rng: f"{_number(rng)}{pick(rng, ('公斤', '克'))}"),
        "price": belonging(lambda rng: f"{_number(rng)}元"),
        "code": belonging(_code),
        "colour": belonging(lambda rng: f"{pick(rng, ZH_SHADES)}{pick(rng, ZH_COLOURS)}色"),
        "material": belonging(lambda rng: f"{pick(rng, ZH_FINISHES)}{pick(rng, ZH_MATERIALS)}"),
        "motif": belonging(lambda rng: f"{pick(rng, ZH_COLOURS)}色{pick(rng, ZH_MOTIFS)}"),
        "date": belonging(_zh_date),
        "time": belonging(_time),
        "size": belonging(lambda rng: _size(rng).replace(" x ", "×")),
        "place": _zh_place,
        "person": _zh_person,
        "word": zh_name,
    },
}


def value(rng: Random, split: Split, language: Language, kind: str) -> str:
    """A value of a kind ('measure', 'price', 'code', ...)."""
    return VALUES[language][kind](rng, split)


def product(rng: Random, split: Split, language: Language) -> str:
    """A product: a made-up name and what it is."""
    if language == "zh":
        return zh_name(rng, split) + pick(rng, ZH_PRODUCTS)
    return f"{name(rng, split)} {pick(rng, PRODUCTS)}"
