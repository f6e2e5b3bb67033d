"""A model in several GGUF files, as llama.cpp splits them: x-00001-of-00003.gguf and so on.

The first file has the metadata of the model; each has ``split.no``, ``split.count`` and
``split.tensors.count`` of all files together, and tensors of its own.
"""

import re
from pathlib import Path

from ..arrays import Float32Array, UInt8Array
from ..bounded_json import JsonObject
from ..bundle.in_place import FILE_BYTES
from ..errors import FormatError, shown
from ..numbers import is_whole
from .gguf import GgufFile, GgufTensor, TensorType

NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MOST_FILES = 4096


class SplitGguf:
    """The files of a model together, with the interface of a GgufFile.

    path  the first of them; the others lie beside it
    Raises FormatError where one is missing, is not sound, or belongs to another model.
    """

    metadata: JsonObject
    tensors: dict[str, GgufTensor]

    def __init__(self, first: GgufFile) -> None:
        self.path, self.files, self.metadata = first.path, [first], first.metadata
        self.size, self.tensors = first.size, dict(first.tensors)
        self.holder = dict.fromkeys(first.tensors, first)  # {tensor: the file that has it}
        try:
            for path in self._others():
                self._add(path)
            total = self.metadata.get(TENSORS)
            if not is_whole(total) or total != len(self.tensors):
                raise FormatError(
                    f"{self.path}: its files have {len(self.tensors)} tensors together; metadata "
                    f"{TENSORS} is {shown(total)}"
                )
        except BaseException:
            self.close()
            raise

    def _others(self) -> list[Path]:
        """The paths of the files but the first, by that one's name."""
        named, count = NAME.fullmatch(self.path.name), self.metadata[COUNT]
        if not is_whole(count, 2, MOST_FILES):
            raise FormatError(f"{self.path}: metadata {COUNT} is {shown(count)}")
        if named is None or int(named[3]) != count:
            raise FormatError(
                f"{self.path}: is one of {count} files; its name should end "
                f"-00001-of-{count:05}.gguf, as the others' do"
            )
        first = self.path.with_name(f"{named[1]}-00001-of-{count:05}.gguf")
        number = self.metadata.get(NUMBER)
        if not is_whole(number, 0, 0) or int(named[2]) != 1:
            raise FormatError(f"{self.path}: is not the first of {count} files; give {first.name}")
        return [
            self.path.with_name(f"{named[1]}-{number:05}-of-{count:05}.gguf")
            for number in range(2, count + 1)
        ]

    def _add(self, path: Path) -> None:
        """Open the next file."""
        file = GgufFile(path)
        self.files.append(file)
        self.size += file.size
        for key, expected in ((NUMBER, len(self.files) - 1), (COUNT, self.metadata[COUNT])):
            value = file.metadata.get(key)
            if not is_whole(value) or value != expected:
                raise FormatError(f"{path}: metadata {key} is {shown(value)}, not {expected}")
        for name, tensor in file.tensors.items():
            if name in self.tensors:
                raise FormatError(f"{path}: tensor {shown(name)} is in another file, too")
            self.tensors[name], self.holder[name] = tensor, file

    def address(self, name: str) -> int:
        """As ``GgufFile.address``; the files are numbered from 1 on."""
        return self.files.index(self.holder[name]) * FILE_BYTES + self.holder[name].address(name)

    def raw_rows(self, name: str, start: int = 0, stop: int | None = None) -> UInt8Array:
        """As ``GgufFile.raw_rows``."""
        return self.holder[name].raw_rows(name, start, stop)

    def decode(self, kind: TensorType, raw: UInt8Array) -> Float32Array:
        """As ``GgufFile.decode``."""
        return self.files[0].decode(kind, raw)

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_gguf(path: Path | str) -> GgufFile | SplitGguf:
    """A model's GGUF file, or its files, of which ``path`` is the first. Raises FormatError."""
    file = GgufFile(path)
    return file if is_whole(file.metadata.get(COUNT, 1), 0, 1) else SplitGguf(file)
