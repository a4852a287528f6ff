"""Tiny base models, made here: for tests, and for trying Coadapt where no hub can be reached.

    python -m simulations.tiny_base DIR --kind causal --steps 300

writes a Llama of about a million parameters with a byte-level tokenizer, trained for a moment on the default
scenario's contract clauses; `--kind encoder` a BERT. They know next to nothing: they show that things run.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.durable import new_folder
from common.randomness import seed_dropout, seeded
from simulations.contracts import records

__all__ = ["make_causal", "make_encoder"]

VOCABULARY = 2000
LONGEST = 512


def make_causal(folder: Path, *, steps: int = 0, width: int = 128, layers: int = 4) -> Path:
    """Write a tiny Llama with a byte-level BPE tokenizer to a new folder; `steps` of training on contract clauses."""
    seed_dropout(0, "tiny causal base")  # torch draws the first weights
    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    _pretrain(model, tokenizer, steps)
    return _save(folder, model, tokenizer)


def make_encoder(folder: Path, *, width: int = 64, layers: int = 2) -> Path:
    """Write a tiny untrained BERT with a WordPiece tokenizer to a new folder."""
    seed_dropout(0, "tiny encoder base")
    tokenizer = _wordpiece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, BertModel(config), tokenizer)


def _texts() -> list[str]:
    return [row["text"] for row in records("train", 0)]


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=LONGEST
    )


def _wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, mask_token="[MASK]", model_max_length=LONGEST)


def _pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Plain next-token training on batches of 16 clauses."""
    texts, rng = _texts(), seeded(0, "tiny causal base", "batches")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        rows = [texts[index] + "</s>" for index in rng.integers(len(texts), size=16)]
        batch: Any = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=128)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _save(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    with new_folder(folder) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return folder


def main(
    folder: Annotated[Path, typer.Argument(help="New folder for the base.")],
    kind: Annotated[str, typer.Option(help="causal or encoder.")] = "causal",
    steps: Annotated[int, typer.Option(min=0, help="Training steps of a causal base.")] = 300,
) -> None:
    """Write a tiny base model to FOLDER."""
    if kind not in ("causal", "encoder"):
        raise typer.BadParameter("must be causal or encoder", param_hint="--kind")
    made = make_causal(folder, steps=steps) if kind == "causal" else make_encoder(folder)
    print(f"wrote {made}; use it with --set model.base={made}")


if __name__ == "__main__":
    typer.run(main)
