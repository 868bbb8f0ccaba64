"""Images in rows: which there are, where they stand in the text, and what a model's own processor makes of them.

Files are opened when a batch is computed, and held no longer. Letters: N images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.data.messages import MARK, BadRow, Message, kind_of
from smidgen.errors import DataError
from smidgen.foreign import shown

if TYPE_CHECKING:
    import torch

# Pillow knows more formats; some of them run other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class BadImage(DataError):
    """An image cannot be read, or is not where the text says."""


def take_images(row: Mapping[str, Any], messages: Sequence[Message], named: Sequence[str | None]) -> tuple[str, ...]:
    """Answer the names of a row's images, and note in each message how many of its marks are images.

    They come from the parts of the messages (`named`; None for a part without a path) or from the field 'images'.

    Raises:
        BadRow: they come from both, one is not named, or there are more or fewer than marks in the text.
    """
    column = row.get("images")
    column = [column] if isinstance(column, str | dict) else column or []
    if not isinstance(column, list):
        raise BadRow(f"field 'images' must be a list of paths, got {kind_of(column)}")
    paths = [image.get("path") if isinstance(image, dict) else image for image in column]
    if paths and any(name is not None for name in named):
        raise BadRow("images are named in the messages and in the field 'images'; keep one of them")
    names = tuple(name for name in paths or named if isinstance(name, str) and name)
    if len(names) < len(paths or named):
        raise BadRow("an image must be named by the path of its file: {'type': 'image', 'path': 'a.png'}")
    marks = [message["content"].count(MARK) for message in messages]
    if names and sum(marks) != len(names):
        raise BadRow(f"{len(names)} images, but {sum(marks)} times {MARK} in the text")
    for message, count in zip(messages, marks if names else [], strict=False):
        if count:
            message["images"] = count
    return names


def in_parts(message: Message) -> Message:
    """The message with its content as a list of parts, as templates of models that take images read it."""
    parts: list[dict[str, str]] = []
    for text in message["content"].split(MARK) if message.get("images") else [message["content"]]:
        parts += [{"type": "image"}] * bool(parts) + [{"type": "text", "text": text}]
    return {**message, "content": [part for part in parts if part.get("text") != ""] or parts}


def image_path(folder: Path, name: str) -> str:
    """Answer the path of an image that a data file in `folder` names.

    Raises:
        BadImage: there is no such file, or it lies outside of the folder.
    """
    home = folder.resolve()
    try:
        path = (home / name).resolve()
        found = path.is_file()
    except (OSError, ValueError) as error:  # a name that no system takes
        raise BadImage(f"image {shown(repr(name))}: {shown(error)}") from None
    if not path.is_relative_to(home):
        raise BadImage(f"image {shown(repr(name))}: leads out of the data file's folder; put the images into it")
    if not found:
        raise BadImage(f"image {shown(repr(name))}: no such file in {home}; paths start at the data file's folder")
    return str(path)


class ImageReader:
    """What a model's processor makes of images: the tokens that stand for each, and the tensors that the model takes.

    token, token_id: what stands for one image in a rendered chat, before it becomes as many tokens as the model needs.

    Args:
        processor: of transformers, for images and text.

    Raises:
        BadImage: the model takes more than images: inputs beside its tokens that are not made here.
    """

    def __init__(self, processor: Any) -> None:
        from PIL import Image

        self._processor = processor
        self.token: str = processor.image_token
        self.token_id: int = processor.tokenizer.convert_tokens_to_ids(self.token)
        made = self._process([Image.new("RGB", (32, 32))], None)
        others = made.keys() - {*processor.image_processor.model_input_names, "input_ids", "attention_mask"}
        if others:
            raise BadImage(f"its processor makes {', '.join(sorted(others))}, which are not handled")

    def example(self, folder: Path) -> str:
        """Write an image, always the same, into the folder; answer its path."""
        from PIL import Image

        path = folder / "example.png"
        Image.radial_gradient("L").save(path)
        return str(path)

    def save(self, folder: Path) -> None:
        """Write the processor's files, with those of the tokenizer it was made with."""
        self._processor.save_pretrained(folder)

    def tokens(self, path: str) -> list[int]:
        """The ids of the tokens that stand for an image; some models need more of them for a larger one.

        Raises:
            BadImage: the file cannot be read.
        """
        return list(self._process([_open(path)], None)["input_ids"][0])

    def expand(
        self, ids: Sequence[int], learned: Sequence[tuple[int, int]], paths: Sequence[str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Put the tokens of each image in the place of its mark; answer all ids, and the learned ranges without them.

        Raises:
            BadImage: there are more or fewer marks than images, or an image cannot be read.
        """
        marks = list(ids).count(self.token_id)
        if marks != len(paths):
            raise BadImage(f"{len(paths)} images, but {marks} times {self.token} in the text of the row")
        if not paths:
            return list(ids), list(learned)
        following = iter(paths)
        whole: list[int] = []
        flags: list[bool] = []
        inside = [any(first <= place < end for first, end in learned) for place in range(len(ids))]
        for token, flag in zip(ids, inside, strict=True):
            image = token == self.token_id
            here = self.tokens(next(following)) if image else [token]
            whole += here
            flags += [flag and not image] * len(here)
        return whole, list(_ranges(flags))

    def inputs(self, paths: Sequence[str], device: torch.device | str) -> dict[str, torch.Tensor]:
        """What the model takes of N images beside the tokens, such as `pixel_values`, made anew from their files.

        Raises:
            BadImage: a file cannot be read.
        """
        made = self._process([_open(path) for path in paths], "pt")
        names = self._processor.image_processor.model_input_names
        return {name: made[name].to(device) for name in names if name in made}

    def _process(self, images: list[Any], tensors: str | None) -> Any:
        text = [self.token * len(images)]
        return self._processor(text=text, images=images, add_special_tokens=False, return_tensors=tensors)


def _open(path: str) -> Any:
    from PIL.Image import DecompressionBombError
    from PIL.Image import open as open_image

    try:
        with open_image(path, formats=_FORMATS) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, DecompressionBombError) as error:
        told = "no image that can be read" if type(error).__name__ == "UnidentifiedImageError" else shown(error)
        raise BadImage(f"image {path}: {told}") from None


def _ranges(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    place = 0
    for flag, group in groupby(flags):
        end = place + sum(1 for _ in group)
        if flag:
            yield place, end
        place = end
