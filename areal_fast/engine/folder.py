"""Reading a Hugging Face tokenizer folder without transformers: what AutoTokenizer would make of it.

A folder holds tokenizer.json (the whole encoder, loaded by the `tokenizers` package), tokenizer_config.json
(the named special tokens, more added tokens, the chat template, decoding options) and, in newer ones, the
template in a file of its own. Importing transformers to read them costs seconds and a few hundred MiB a
worker, so it is done here, by transformers' rules:

- added tokens that the config names and tokenizer.json lacks are added, in the order of their ids, then
  named ones;
- a chat_template.jinja (or additional_chat_templates/*.jinja) beats the config's entry;
- special_tokens_map.json and added_tokens.json count only where the config has no added_tokens_decoder;
- no padding id means the eos id.

A folder without tokenizer.json, or whose tokenizer is Python code of its own (`auto_map`), needs
transformers: tokenizer_helper.py. Must not: download anything, run anything from the folder.
Source: transformers 5 tokenization_utils_base.py, tokenization_utils_tokenizers.py (behaviour).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# what a tokenizer class names where the config does not
_CLASS_TOKENS: dict[str, dict[str, str]] = {
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    },
}


class TokenizerError(Exception):
    """The folder can't be used as a tokenizer; str() is one line for the operator."""


class Folder(msgspec.Struct):
    """A loaded folder."""

    tokenizer: Tokenizer
    named_tokens: dict[str, str]
    """bos_token, eos_token…: only those that are set."""
    chat_template: str | dict[str, str] | None
    clean_up_spaces: bool
    """Whether decoded text goes through `clean_up` (never with BPE, where it would eat real spaces)."""


def read_json(path: Path) -> Any:
    """The file's JSON, or None if there is no such file. Raises TokenizerError."""
    try:
        return msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error


def needs_own_code(path: Path) -> bool:
    """Does the folder's config name a tokenizer class that comes as Python code with it?"""
    auto_map = (read_json(path / "tokenizer_config.json") or {}).get("auto_map")
    return bool(auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map)


def load_folder(path: Path) -> Folder:
    """Load the folder. Raises TokenizerError. Takes about 0.3 s for a vocabulary of 150k."""
    if not path.is_dir():
        raise TokenizerError(f"tokenizer path {path} is not a folder, nor a model in the Hugging Face cache")
    config = read_json(path / "tokenizer_config.json") or {}
    if not isinstance(config, dict):
        raise TokenizerError(f"{path / 'tokenizer_config.json'} does not hold an object")
    file = path / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(f"{path} holds no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises bare Exception
        raise TokenizerError(f"cannot load {file}: {error}") from error
    give_memory_back()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    try:
        named = _named_tokens(path, config)
        _add_missing_tokens(tokenizer, path, config, named)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: bad special tokens: {error}") from error
    is_bpe = type(tokenizer.model).__name__ == "BPE"
    forced = bool(
        config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    )
    return Folder(
        tokenizer=tokenizer,
        named_tokens={name: str(token) for name, token in named.items() if name in NAMED_TOKENS},
        chat_template=_chat_template(path, config),
        clean_up_spaces=bool(config.get("clean_up_tokenization_spaces", False)) and (forced or not is_bpe),
    )


def give_memory_back() -> None:
    """Return to the system what reading tokenizer.json, and building tables from it, took and freed: 98 of
    165 MiB with Qwen's vocabulary, in every worker. A call of glibc's; elsewhere nothing happens."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another libc


def _token(value: Any) -> str | AddedToken:
    """A token as configs write it: text, or an object of AddedToken's members."""
    if isinstance(value, dict):
        members = {
            key: value[key] for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value
        }
        return AddedToken(value["content"], special=value.get("special", True), **members)
    if not isinstance(value, str):
        raise TypeError(f"a token must be text or an object, got {value!r}")
    return value


def _named_tokens(path: Path, config: dict[str, Any]) -> dict[str, str | AddedToken]:
    """Every `*_token` the folder names (model-specific ones too), as transformers merges its sources."""
    class_name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    merged: dict[str, Any] = dict(_CLASS_TOKENS.get(class_name, {}))
    merged.update({k: v for k, v in config.items() if k.endswith("_token") and not k.startswith("add_")})
    if "added_tokens_decoder" not in config:
        more = read_json(path / "special_tokens_map.json") or {}
        merged.update({k: v for k, v in more.items() if k.endswith("_token")})
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        merged.update(extra)
    return {name: _token(value) for name, value in merged.items() if value is not None}


def _add_missing_tokens(
    tokenizer: Tokenizer, path: Path, config: dict[str, Any], named: dict[str, str | AddedToken]
) -> None:
    """Add what the config names and tokenizer.json lacks, in transformers' order (which decides the new
    ids)."""
    listed: dict[int, AddedToken] = {}
    for number, members in (config.get("added_tokens_decoder") or {}).items():
        token = _token({"special": False, **members})
        assert isinstance(token, AddedToken)
        listed[int(number)] = token
    if "added_tokens_decoder" not in config:
        special = {str(token) for token in named.values()}
        for content, number in (read_json(path / "added_tokens.json") or {}).items():
            is_special = content in special
            listed[int(number)] = AddedToken(content, normalized=not is_special, special=is_special)
    present = tokenizer.get_added_tokens_decoder()
    known = {repr(token) for token in present.values()}
    contents = {token.content for token in present.values()}
    to_add: list[str | AddedToken] = [
        token for _, token in sorted(listed.items()) if repr(token) not in known
    ]
    contents.update(str(token) for token in to_add)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = [*named.values(), *(_token(token) for token in (extra if isinstance(extra, list) else []))]
    for token in more:
        if str(token) not in contents:
            contents.add(str(token))
            to_add.append(token)
    names = {str(token) for name, token in named.items() if name in NAMED_TOKENS}
    additions = [_as_added(token, names) for token in to_add]
    if additions:
        tokenizer.add_tokens(additions)


def _as_added(token: str | AddedToken, names: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and str(token) in names:
        token.special = True
    return token


def _chat_template(path: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    """One template, or several by name. Files beat tokenizer_config.json."""
    found: dict[str, str] = {}
    try:
        if (path / "chat_template.jinja").is_file():
            found["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
        for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
            found[file.stem] = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot read the chat template: {error}") from error
    if found:
        return found["default"] if set(found) == {"default"} else found
    template = config.get("chat_template")
    if template is None:
        legacy = read_json(path / "chat_template.json")  # written by processors of vision models
        template = legacy.get("chat_template") if isinstance(legacy, dict) else None
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    if template is None or isinstance(template, str):
        return template
    raise TokenizerError(f"{path}: chat_template must be text or a list of named texts")


def clean_up(text: str) -> str:
    """Undo the spaces a WordPiece decoder puts before punctuation and contractions (transformers' rule, in
    its order)."""
    for spaced, joined in (
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ):
        text = text.replace(spaced, joined)
    return text
