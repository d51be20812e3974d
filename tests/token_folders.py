"""Small tokenizers of other families, trained in a moment, as folders; and one place that makes each folder
once.

Each is loaded by transformers in the tests that compare with it, so the folder is what transformers itself
saves.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests import qwen_folder

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "user assistant system tool Hello world, hello again! 12345 67890",
    "Ein Satz mit Umlauten: äöü ß. Et en français: été, ça. 你好，世界。 Привет, мир.",
    "def f(x):\n    return x + 1\n\n\nprint(f(41))  # forty-two",
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' }}"
)


@functools.cache
def scratch() -> Path:
    """A folder that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="areal-fast-tokens-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def qwen() -> Path:
    return qwen_folder.build(scratch() / "qwen")


def _save(name: str, tokenizer: Any, template: str, **named: Any) -> Path:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = template
    wrapped.save_pretrained(str(scratch() / name))
    return scratch() / name


@functools.cache
def llama3() -> Path:
    """Byte-level BPE, groups of digits, special tokens with text of the model's own around them, a bos
    token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|\s+(?!\S)|\s+| ?[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(60)]
    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", *reserved]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return _save("llama3", tokenizer, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


@functools.cache
def metaspace(prepend_scheme: str) -> Path:
    """SentencePiece-like BPE with byte fallback. "first": only the first piece of a text gets a space
    before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme=prepend_scheme, split=False
    )
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *[f"<0x{i:02X}>" for i in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names[:5], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS * 4, *names[5:]], trainer)
    tokenizer.add_tokens([name for name in names[5:] if tokenizer.token_to_id(name) is None])
    return _save(
        f"metaspace-{prepend_scheme}",
        tokenizer,
        MISTRAL,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@functools.cache
def stripping() -> Path:
    """Added tokens that eat the whitespace around them (as Phi-3's do), next to one that does not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(
        [
            AddedToken("<|endoftext|>", normalized=False),
            AddedToken("<|end|>", rstrip=True, normalized=False),
            AddedToken("<|user|>", rstrip=True, normalized=False),
            AddedToken("<|assistant|>", rstrip=True, normalized=False),
            AddedToken("<mask>", lstrip=True, normalized=False),
        ]
    )
    return _save("stripping", tokenizer, PHI, eos_token="<|endoftext|>")


@functools.cache
def wordpiece() -> Path:
    """WordPiece with a lower-casing normalizer, and spaces cleaned up after decoding."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[UNK]", "[PAD]", "[SEP]", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return _save(
        "wordpiece",
        tokenizer,
        CHATML,
        eos_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
        clean_up_tokenization_spaces=True,
    )
