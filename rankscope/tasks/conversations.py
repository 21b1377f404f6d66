"""Conversations, about images or in text: read from the rows of a table, and encoded by a model's own processor or tokenizer."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rankscope.columns import ROLES, check_messages
from rankscope.errors import TaskError, one_line, shown
from rankscope.tasks.data import check_cells, in_words, read_columns
from rankscope.tasks.pretrained import load_pretrained
from rankscope.tasks.rows import UnusableError

IGNORED = -100  # the label of a token that no loss or metric counts

_PLACE = "<image>"  # of an image in a text, as LLaVA's data files have it

# With `role`, and as `content` a text, or where there may be images, a list of parts, each with `type` text or image.
Message = dict[str, Any]


class Conversation(NamedTuple):
    """One row."""

    number: int  # in the data, from 1
    split: Any  # as the data names it; None if it does not
    images: tuple[Any, ...]  # each a path, the bytes of a file, or a PIL image
    messages: tuple[Message, ...]
    given: int = 0  # messages at the beginning of which nothing is learned

    def content(self) -> list[Any]:
        """Images, and what is said about them, for hashes."""
        images = [image if isinstance(image, str | bytes) else np.asarray(image) for image in self.images]
        return [images, json.dumps(self.messages)]


# --- rows ---------------------------------------------------------------------------------------------------------


def read_conversations(
    data: str | Path | pd.DataFrame, columns: Mapping[str, str] | None, *, text_only: bool
) -> list[Conversation]:
    """Read and check all rows. `columns` and `text_only` are as for `ImageTextToText`; images are not opened."""
    table, named = read_columns("image-text-to-text", data, columns)
    if "messages" not in named:
        check_cells(table, named["question"], named["answer"], filled=True, what=in_words(data))
    rows = [_row(number, row, named) for number, row in enumerate(table.to_dict("records"), start=1)]
    bare = [row.number for row in rows if not row.images]
    if bare and not text_only:
        must = f"the column {named['image']!r} must hold an image in every row"
        found = f"{len(bare):,} of {len(rows):,} have none, as row {bare[0]:,}"
        raise TaskError(f"{must}, but {found}; drop them, or set `text_only: true`.")
    return rows


def _row(number: int, values: Mapping[Any, Any], named: Mapping[str, str]) -> Conversation:
    where = f"row {number:,}"
    images = images_of(values[named["image"]], where=where)
    if "messages" in named:
        turns = _turns(values[named["messages"]], where=where)
    else:
        turns = [("user", str(values[named["question"]])), ("assistant", str(values[named["answer"]]))]
    messages: list[Message] = [{"role": role, "content": _parts(content, role, where=where)} for role, content in turns]
    spoken = [message for message in messages if message["role"] != "system"]
    if not spoken or spoken[0]["role"] != "user" or not any(message["role"] == "assistant" for message in spoken):
        raise TaskError(f"each row must hold a question, then an answer, but {where} does not; drop it.")
    while messages[-1]["role"] != "assistant":  # nothing is learned from what comes after the last answer
        messages.pop()
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places == 0:
        spoken[0]["content"][:0] = [{"type": "image"} for _ in images]
    elif places != len(images):
        must = "each row must have as many images as places for them"
        raise TaskError(f"{must}, but {where} has {len(images)} and {places}; correct it.")
    return Conversation(number, values.get("split"), images, tuple(messages))


def read_chats(data: str | Path | pd.DataFrame, columns: Mapping[str, str] | None) -> list[Conversation]:
    """Read and check all rows of conversations in text. `columns` are as for `Chat`."""
    table, named = read_columns("chat", data, columns)
    rows, unanswered = [], []
    for number, row in enumerate(table.to_dict("records"), start=1):
        where = f"row {number:,}"
        if "messages" in named:
            before, turns = [], _texts(_turns(row[named["messages"]], where=where), where=where)
        else:
            before = _texts(_said(row[named["prompt"]], "user", where=where), where=where)
            turns = _texts(_said(row[named["completion"]], "assistant", where=where), where=where)
        if not any(role == "assistant" for role, _ in turns) or not before + turns[:-1]:
            unanswered.append(number)
            continue
        while turns[-1][0] != "assistant":  # nothing is learned from what comes after the last answer
            turns.pop()
        said = tuple({"role": role, "content": content} for role, content in before + turns)
        rows.append(Conversation(number, row.get("split"), (), said, len(before)))
    if unanswered:
        must = "each row must hold a turn of the assistant, and one before it"
        found = f"{len(unanswered):,} of {len(table):,} do not, as row {unanswered[0]:,}"
        raise TaskError(f"{must}, but {found}; drop them.")
    return rows


def _said(value: Any, role: str, *, where: str) -> list[tuple[str, Any]]:
    """The turns of a prompt or a completion: a list of messages, or one text."""
    return [(role, value)] if isinstance(value, str) else _turns(value, where=where)


def _texts(turns: list[tuple[str, Any]], *, where: str) -> list[tuple[str, str]]:
    """Turns whose content is text."""
    texts = []
    for role, content in turns:
        if isinstance(content, list | tuple | np.ndarray):
            parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            content = None if None in parts else "".join(map(str, parts))
        if not isinstance(content, str) or not content.strip():
            raise TaskError(
                f"each turn must hold a text, but {where} has one of the {role} without; correct or drop it."
            )
        texts.append((role, content))
    return texts


def images_of(value: Any, *, where: str) -> tuple[Any, ...]:
    """Images of one cell: paths, bytes, or PIL images."""
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        return tuple(image for each in value for image in images_of(each, where=where))
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if value is None or value is pd.NA or value == "" or (isinstance(value, float) and np.isnan(value)):
        return ()
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise TaskError(
            f"images must be paths or bytes, but {where} holds the address {shown(value)}; download it first."
        )
    if isinstance(value, str | bytes) or hasattr(value, "convert"):
        return (value,)
    raise TaskError(f"images must be paths or bytes, but {where} holds {shown(value)}; convert it.")


def _turns(value: Any, *, where: str) -> list[tuple[str, Any]]:
    """Role and content of each message."""
    check_messages(value, where=where)
    turns = []
    for message in value:
        content = message.get("content")
        role = ROLES[message.get("role") or message.get("from")]
        turns.append((role, message.get("value") if content is None else content))
    return turns


def _parts(content: Any, role: str, *, where: str) -> list[dict[str, Any]]:
    """A message's content as a list of texts and places for images."""
    if isinstance(content, str):
        texts = content.split(_PLACE) if role == "user" else [content]
        if len(texts) > 1:  # the line break between a place and its text is not the text's
            texts = [text.strip("\n") for text in texts]
        parts: list[dict[str, Any]] = []
        for text in texts:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        return [part for part in parts[1:] if part.get("text") != ""]
    if isinstance(content, list | tuple | np.ndarray):
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if set(kinds) <= {"text", "image"}:
            pairs = zip(content, kinds, strict=True)
            return [{"type": kind} | ({"text": str(part["text"])} if kind == "text" else {}) for part, kind in pairs]
    must = "the content of a message must be a text, or a list of parts of type text or image"
    raise TaskError(f"{must}, but {where} holds {shown(content)}; convert it.")


def open_image(image: Any, folder: Path) -> Any:
    """Return a PIL image in RGB, upright; raise an UnusableError if it cannot be read. Paths start from `folder`."""
    from PIL import Image, ImageOps

    what = f"`{image}`" if isinstance(image, str) else "its image"
    try:
        if isinstance(image, str | bytes):
            image = Image.open(BytesIO(image) if isinstance(image, bytes) else folder / image)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip
            pixels = np.asarray(image)
            image = Image.fromarray((pixels // 256 if pixels.max() > 255 else pixels).astype(np.uint8))
        return image.convert("RGB")
    except FileNotFoundError:
        raise UnusableError(f"there is no file {what} in {folder}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnusableError(f"{what} cannot be read: {one_line(error)}") from error


# --- tokens -------------------------------------------------------------------------------------------------------


def load_processor(source: str | Path, **options: Any) -> Any:
    """Load a model's processor; a TaskError if it cannot make inputs of images and texts.

    Where torchvision is missing, a processor for images and videos is built without its half for videos, which needs it.
    """
    from transformers import PROCESSOR_MAPPING
    from transformers.utils import is_torchvision_available

    kind = PROCESSOR_MAPPING.get(type(load_pretrained("AutoConfig", source, **options)), None)
    if kind and "video_processor" in inspect.signature(kind).parameters and not is_torchvision_available():
        processor = _without_videos(kind, source, **options)
    else:
        processor = load_pretrained("AutoProcessor", source, **options)
    must, has = f"`{source}` must have a processor", type(processor).__name__
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise TaskError(f"{must} for images and texts, but has only {has}; save it there with save_pretrained.")
    tokenizer, token = processor.tokenizer, getattr(processor, "image_token", None)
    if token is None or token not in tokenizer.get_vocab():
        found = f"{has} has none" if token is None else f"the tokenizer of {has} lacks {token!r}"
        raise TaskError(f"{must} with an image token, but {found}; add it to the tokenizer, and save the processor.")
    if not takes_suffix(processor):
        if not (processor.chat_template or getattr(tokenizer, "chat_template", None)):
            raise TaskError(f"{must} with a chat template, but {has} has none; save it with one, as `chat_template`.")
        if not tokenizer.is_fast:
            raise TaskError(f"{must} with a fast tokenizer, but has {type(tokenizer).__name__}; convert it.")
    return processor


def _without_videos(kind: type, source: str | Path, **options: Any) -> Any:
    class ImagesOnly(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    parts = {"image_processor": load_pretrained("AutoImageProcessor", source, **options)}
    parts |= {"tokenizer": load_pretrained("AutoTokenizer", source, **options), "video_processor": None}
    ImagesOnly.__name__ = kind.__name__
    values, _ = kind.get_processor_dict(source, local_files_only=Path(source).is_dir(), **options)  # type: ignore[attr-defined]
    taken = inspect.signature(kind).parameters.keys() - parts.keys()
    try:
        return ImagesOnly(**parts, **{key: value for key, value in values.items() if key in taken})
    except ImportError as error:
        raise TaskError(f"`{source}` must have a processor that loads, but has none: {one_line(error)}") from error


def takes_suffix(processor: Any) -> bool:
    """Whether the processor takes question and answer as a prefix and a suffix, as PaliGemma's does, and has no chats."""
    from transformers import PaliGemmaProcessor

    return isinstance(processor, PaliGemmaProcessor)


def encode(processor: Any, row: Conversation, images: list[Any]) -> dict[str, Tensor]:
    """The model's inputs for one conversation, in a batch of one, with `labels`; an UnusableError if the processor fails."""
    make = _encode_suffix if takes_suffix(processor) else _encode_chat
    try:
        return make(processor, row, images)
    except (ValueError, TypeError, IndexError) as error:  # for sizes and texts that it does not take
        if isinstance(error, TaskError):
            raise
        raise UnusableError(f"the processor fails: {one_line(error)}") from error


def _encode_suffix(processor: Any, row: Conversation, images: list[Any]) -> dict[str, Tensor]:
    """Inputs of a question before an answer, to which the processor adds BOS, a line break, and EOS."""
    question, answer = (
        "".join(processor.image_token if part["type"] == "image" else part["text"] for part in message["content"])
        for message in row.messages
    )
    inputs = dict(processor(images=[images], text=[question], suffix=[answer]).convert_to_tensors("pt"))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 0, IGNORED)
    return inputs


def _encode_chat(processor: Any, row: Conversation, images: list[Any]) -> dict[str, Tensor]:
    """Inputs of a conversation in the processor's chat template."""
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    # The processor's own method adds nothing for images; that of SmolVLM needs its half for videos.
    text, spans = _render(tokenizer, template, row, of=type(processor).__name__)
    options = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
    options["add_special_tokens"] = not _begun(tokenizer, text)
    encoded = processor(text=[text], images=[images] if images else None, **options)
    offsets, replaced = encoded.pop("offset_mapping")[0], (encoded.pop("text_replacement_offsets", None) or [[]])[0]
    inputs = dict(encoded.convert_to_tensors("pt"))
    moved = [(_moved(start, replaced), _moved(end, replaced)) for start, end in spans]
    return {**inputs, "labels": _labels(inputs["input_ids"], offsets, moved)}


def encode_chat(tokenizer: Any, row: Conversation) -> dict[str, Tensor]:
    """The model's inputs for one conversation in text, in a batch of one, with `labels`; an UnusableError if none can be made."""
    from jinja2 import TemplateError

    try:
        text, spans = _render(tokenizer, tokenizer.chat_template, row, of=type(tokenizer).__name__)
    except TemplateError as error:  # of roles that do not alternate, and the like
        raise UnusableError(f"the chat template refuses it: {one_line(error)}") from error
    special = not _begun(tokenizer, text)
    encoded = tokenizer([text], return_offsets_mapping=True, add_special_tokens=special, verbose=False)
    offsets = encoded.pop("offset_mapping")[0]
    inputs = dict(encoded.convert_to_tensors("pt"))
    return {**inputs, "labels": _labels(inputs["input_ids"], offsets, spans)}


def _begun(tokenizer: Any, text: str) -> bool:
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _labels(tokens: Tensor, offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tensor:
    """(1, length): the tokens inside the spans of the text, from offset to offset."""
    labels = torch.full_like(tokens, IGNORED)
    for start, end in spans:
        inside = [i for i, (first, last) in enumerate(offsets) if first < last and first < end and last > start]
        labels[0, inside] = tokens[0, inside]
    return labels


def _moved(place: int, replaced: Sequence[Mapping[str, Any]]) -> int:
    """A place in the text, after the images' places before it have become longer."""
    gains = [each["new_span"][1] - each["span"][1] for each in replaced if each["span"][1] <= place]
    return place + (gains[-1] if gains else 0)


def _render(tokenizer: Any, template: Any, row: Conversation, *, of: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as one text, and where in it each answer begins and ends. The template is that `of` a class."""
    messages = list(row.messages)
    if isinstance(template, dict):
        template = template["default"]
    render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    text: str = render(messages)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < row.given:
            continue
        before = render(messages[:index], add_generation_prompt=True)
        if not text.startswith(before):
            must = "the chat template must begin an answer as it prompts for one"
            raise TaskError(f"{must}, but that of {of} does not in row {row.number:,}; correct it.")
        # A template may write the last answer otherwise than those before it, as one that keeps only the last one's thoughts.
        after = text if index == len(messages) - 1 else render(messages[: index + 1])
        said, ended = (_end_of(message["content"], each, len(before)) for each in (text, after))
        if said is None or ended is None:
            must = "the chat template must write each answer as it is"
            raise TaskError(f"{must}, but that of {of} drops or changes one in row {row.number:,}; correct it.")
        ends = zip(text[said:], after[ended:], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
        spans.append((len(before), max(len(text[: said + shared].rstrip()), len(before))))
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    if tokenizer.eos_token and not text.rstrip().endswith(special):
        text = text.rstrip() + tokenizer.eos_token
        spans[-1] = (spans[-1][0], len(text))
    return text, spans


def _end_of(content: Any, text: str, start: int) -> int | None:
    """Where in a text, from `start`, a message's content ends; None if it is not there."""
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    for part in parts:
        if (found := text.find(part.strip(), start)) < 0:
            return None
        start = found + len(part.strip())
    return start
