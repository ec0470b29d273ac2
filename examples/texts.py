"""Words and their definitions: WordNet where it is installed, a small sample otherwise; and texts as hashed n-grams."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

FOLDERS = ("/usr/share/wordnet", "/usr/local/share/wordnet")  # where Debian's and others' packages put it
HOW_TO_GET_IT = (
    "WordNet is not installed, so that this is a sample of {n} pairs, too small to measure anything. For its 117,000 pairs: "
    "sudo apt install wordnet-base, or point WNSEARCHDIR or --wordnet at a folder with data.noun"
)
SAMPLE = """
anchor: a heavy hook that holds a ship in place | apple: a round fruit with red or green skin
arrow: a thin pointed shaft shot from a bow | bakery: a shop where bread is made and sold
bell: a hollow metal cup that rings when struck | bridge: a road carried over a river or a gap
broom: a brush on a long handle for sweeping floors | butter: a yellow fat made by churning cream
candle: a stick of wax with a wick that burns | carpet: a thick woven covering for a floor
cave: a natural hollow under the ground or in a cliff | clock: a device that shows the time of day
cloud: a mass of tiny drops of water floating in the sky | comet: a body of ice and dust with a bright tail
compass: an instrument whose needle points north | crown: a circle of gold worn by a king or queen
desert: a dry region where little rain falls | drum: a round instrument beaten with sticks
engine: a machine that turns fuel into motion | fence: a barrier of posts around a field
ferry: a boat that carries people across water | forest: a large area covered with trees
garden: a plot of ground where flowers are grown | glacier: a slow river of ice in the mountains
glove: a covering for the hand with a part for each finger | hammer: a tool with a heavy head for driving nails
harbour: a sheltered place where ships may lie | honey: a sweet thick fluid that bees make
island: land with water all around it | kettle: a pot with a spout for boiling water
key: a shaped piece of metal that opens a lock | ladder: two poles joined by rungs for climbing
lantern: a lamp in a case that can be carried | lemon: a sour yellow fruit
library: a building where books are kept and lent | lighthouse: a tower whose beam guides ships at night
magnet: a piece of iron that attracts iron | market: a place where goods are bought and sold
mirror: a glass that shows what stands before it | needle: a thin pointed pin with an eye for thread
ocean: the great body of salt water | orchard: a field planted with fruit trees
paper: thin sheets for writing made from wood | pillow: a soft cushion for the head in bed
plough: a tool that turns over soil before sowing | river: a large stream that flows to the sea
saddle: a seat for the rider of a horse | sailor: one who works on a ship
shadow: a dark shape where light is blocked | shepherd: one who looks after sheep
spider: an eight-legged animal that spins webs | telescope: an instrument that makes far things look near
thunder: the loud noise that follows lightning | tunnel: a passage dug through a hill
umbrella: a folding cover held against the rain | violin: a small instrument with four strings and a bow
volcano: a mountain that throws out molten rock
"""
EXAMPLES = re.compile(r';?\s*"[^"]*"')  # quoted sentences after a definition, which often contain the word itself


@dataclass(frozen=True)
class Pairs:
    """Words (all lemmas of one meaning) and definitions; the i-th belong together."""

    words: list[str]
    glosses: list[str]
    note: str = ""

    def __len__(self) -> int:
        return len(self.words)

    def split(self, held_out: int, seed: int = 0) -> tuple[Pairs, Pairs]:
        """Training pairs and held-out pairs, shuffled."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = (order[held_out:], order[:held_out])
        train, test = (Pairs([self.words[i] for i in p], [self.glosses[i] for i in p]) for p in parts)
        return train, test


def load(folder: str | None = None) -> Pairs:
    """WordNet's pairs from the folder, or from where it is usually installed; the sample if it is nowhere.

    Raises:
        FileNotFoundError: the folder that was asked for has no data.noun.
    """
    if folder is not None and not (Path(folder) / "data.noun").exists():
        raise FileNotFoundError(
            f"expected WordNet's data.noun in {folder}; Debian's wordnet-base puts it in {FOLDERS[0]}"
        )
    places = [folder] if folder is not None else [os.environ.get("WNSEARCHDIR", ""), *FOLDERS]
    for place in filter(None, places):
        files = sorted(Path(place).glob("data.*"))
        if files:
            return wordnet(files)
    pairs = [entry.split(": ") for line in SAMPLE.strip().splitlines() for entry in line.split(" | ")]
    return Pairs([w for w, _ in pairs], [g for _, g in pairs], HOW_TO_GET_IT.format(n=len(pairs)))


def wordnet(files: Sequence[Path]) -> Pairs:
    """One pair for each synset: its lemmas, and its gloss without the quoted examples."""
    words, glosses = [], []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:  # the licence at the top
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            gloss = EXAMPLES.sub("", gloss).strip(" ;")
            if gloss:
                words.append(", ".join(re.sub(r"\(.*\)", "", lemma).replace("_", " ") for lemma in lemmas))
                glosses.append(gloss)
    return Pairs(words, glosses)


@dataclass(frozen=True)
class Bags:
    """Texts as bags of hashed n-grams: all ids in one row, and where each text starts."""

    ids: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return self.starts.shape[0] - 1

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of these texts and their offsets, as EmbeddingBag takes them."""
        lengths = (self.starts[1:] - self.starts[:-1])[rows]
        offsets = torch.cumsum(lengths, 0) - lengths
        within = torch.arange(int(lengths.sum())) - torch.repeat_interleave(offsets, lengths)
        return self.ids[torch.repeat_interleave(self.starts[rows], lengths) + within], offsets


def bags(texts: Sequence[str], buckets: int) -> Bags:
    """Words and their 3- to 5-grams of characters, by CRC-32 modulo the number of buckets."""
    ids, starts = array("q"), [0]  # 20 million numbers: an array, not a list of objects
    known: dict[str, array[int]] = {}
    for text in texts:
        for word in re.findall(r"\w+", text.lower()):
            if word not in known:
                padded = f"<{word}>"
                grams = {padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)} | {padded}
                known[word] = array("q", sorted(crc32(gram.encode()) % buckets for gram in grams))
            ids.extend(known[word])
        starts.append(len(ids))
    return Bags(torch.from_numpy(np.array(ids, dtype=np.int64)), torch.tensor(starts))
