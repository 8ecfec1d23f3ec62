"""Archives of adapters that lead out, link, unfold or lie."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from pathlib import Path

from tests.bad_inputs.case import case
from tests.bad_inputs.place import Place

CONFIG = "adapter_config.json"


def zipped(place: Place, names: dict[str, bytes]) -> list[str]:
    path = place.inside / "adapter.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return place.merge(path)


def taped(place: Place, *entries: tuple[tarfile.TarInfo, bytes], name: str = "adapter.tar") -> list[str]:
    path = place.inside / name
    with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
        for info, content in entries:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return place.merge(path)


def linked(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


@case("leads out")
def a_zip_that_climbs(place: Place) -> list[str]:
    return zipped(place, {CONFIG: b"{}", "../../outside/canary": b"x"})


@case("leads out")
def a_zip_with_a_root(place: Place) -> list[str]:
    return zipped(place, {CONFIG: b"{}", str(place.canary): b"x"})


@case("leads out")
def a_zip_of_another_system(place: Place) -> list[str]:
    return zipped(place, {CONFIG: b"{}", "C:\\outside\\canary": b"x"})


@case("leads out")
def a_tar_that_climbs(place: Place) -> list[str]:
    return taped(place, (tarfile.TarInfo("../../outside/canary"), b"x"))


@case("no plain file")
def a_tar_with_a_link(place: Place) -> list[str]:
    return taped(place, linked(CONFIG, str(place.outside / "secret.txt")))


@case("no plain file")
def a_tar_with_a_hard_link(place: Place) -> list[str]:
    return taped(place, linked(CONFIG, "../../outside/secret.txt", tarfile.LNKTYPE))


@case("no plain file")
def a_tar_with_a_device(place: Place) -> list[str]:
    return taped(place, linked(CONFIG, "", tarfile.CHRTYPE))


@case("no plain file")
def a_tar_with_a_pipe(place: Place) -> list[str]:
    return taped(place, linked(CONFIG, "", tarfile.FIFOTYPE), name="adapter.tar.gz")


@case("no plain file")
def a_zip_with_a_link(place: Place) -> list[str]:
    path = place.inside / "adapter.zip"
    info = zipfile.ZipInfo(CONFIG)
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, str(place.outside / "secret.txt"))
    return place.merge(path)


@case("larger than")
def a_bomb(place: Place) -> list[str]:
    return zipped(place, {CONFIG: b" " * (300 << 20)})


@case("readable archive")
def a_zip_that_lies_of_its_sizes(place: Place) -> list[str]:
    path = place.inside / "adapter.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, b" " * 100_000)
    data = path.read_bytes()
    small, large = (7).to_bytes(4, "little"), (100_000).to_bytes(4, "little")
    path.write_bytes(data.replace(large, small))
    return place.merge(path)


@case("more than")
def more_files_than_an_adapter_has(place: Place) -> list[str]:
    return zipped(place, {f"file{number}.txt": b"" for number in range(5000)})


@case("twice")
def a_name_given_twice(place: Place) -> list[str]:
    return taped(place, (tarfile.TarInfo(CONFIG), b"{}"), (tarfile.TarInfo(CONFIG), b"[]"))


@case("holds 2 adapters")
def two_adapters(place: Place) -> list[str]:
    return zipped(place, {f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}"})


@case("pickled")
def pickled_weights(place: Place) -> list[str]:
    return zipped(place, {CONFIG: b"{}", "adapter_model.bin": b"\x80\x04."})


@case("readable archive")
def bytes_of_no_archive(place: Place) -> list[str]:
    return place.merge(place.write("adapter.zip", b"\0" * 4096))


@case("readable archive")
def a_tape_that_is_cut(place: Place) -> list[str]:
    packed = zlib.compress(b"x" * 10_000, wbits=31)
    return place.merge(place.write("adapter.tar.gz", packed[:-20]))


@case("readable archive")
def an_encrypted_zip(place: Place) -> list[str]:
    path: Path = place.inside / "adapter.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(CONFIG, b"{}")
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(data))
    return place.merge(path)
