"""A BERT of one layer, without dropout, and a tokenizer for the sample of pairs, in a folder as transformers saves them."""

from pathlib import Path

from examples.texts import Pairs


def save(pairs: Pairs, folder: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = sorted({w for text in (*pairs.words, *pairs.glosses) for w in text.lower().replace("-", " - ").split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # which chunks draw otherwise than whole batches
    BertModel(BertConfig(vocab_size=5 + len(words), **size)).save_pretrained(folder)
