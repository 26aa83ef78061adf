"""What a file is by its content, whatever its name says."""
import json
import string
import struct
import zipfile
from pathlib import Path

SAFETENSORS = 'safetensors'
HEAD = 512  # bytes that are looked at
# Beginnings, and what files with them are
BEGINNINGS = {
    b'version https://git-lfs': 'a Git-LFS pointer and not the file itself; git lfs pull gets it',
    b'\x1f\x8b': 'a gzip archive; unpack it',
    b'\xfd7zXZ': 'an xz archive; unpack it',
    b'BZh': 'a bzip2 archive; unpack it',
    b'7z\xbc\xaf': 'a 7z archive; unpack it',
    b'\x28\xb5\x2f\xfd': 'a zstd archive; unpack it',
    b'\x89HDF': 'an HDF5 file, as Keras writes; weights of PyTorch are needed',
    b'\x89PNG': 'a picture',
    b'\xff\xd8\xff': 'a picture',
    b'%PDF': 'a PDF document',
    b'\x93NUMPY': 'a NumPy array; weights by name are needed',
    b'GGUF': 'a GGUF file; weights of PyTorch are needed',
    b'\x7fELF': 'a program',
}
MARKUP = (b'<!doctype', b'<html', b'<head', b'<?xml', b'<!--')


def kind_of(path: Path) -> str:
    """What a file is: SAFETENSORS, '' for what torch.load may read, else in words, with what to do.

    Raises:
        OSError: it can't be read.
    """
    size = path.stat().st_size
    with open(path, 'rb') as file:
        head = file.read(HEAD)
    if not head:
        return 'empty: damaged, truncated or not a checkpoint'
    for beginning, words in BEGINNINGS.items():
        if head.startswith(beginning):
            return words
    if head.lstrip().lower().startswith(MARKUP):
        return 'a web page and not a checkpoint; its address is not the one of the file itself'
    if is_safetensors(head, size):
        return SAFETENSORS
    if head[257:262] == b'ustar':
        return 'a tar archive; unpack it'
    if head[:1] == b'\x08' and head[2:3] in (b'\x12', b'\x1a', b'\x3a', b'\x42'):  # protobuf: IR version, then a field
        return 'an ONNX model, whose weights have lost their names; take the checkpoint that it was made of'
    if zipfile.is_zipfile(path):
        return kind_of_zip(path)
    if len(head) > 16 and all(byte in string.printable.encode() for byte in head):
        return kind_of_text(path)
    return ''


def is_safetensors(head: bytes, size: int) -> bool:
    """The length of a header, and a header that is JSON."""
    return len(head) > 8 and head[8:9] == b'{' and struct.unpack('<Q', head[:8])[0] + 8 <= size


def kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return ''
    if any(name.endswith('/constants.pkl') or '/code/' in name for name in names):
        return 'a TorchScript program; take the checkpoint that it was made of'
    if any(name.endswith('data.pkl') for name in names):
        return ''
    if names and all(name.endswith('.npy') for name in names):
        return f'a NumPy archive ({", ".join(names[:3])}); a state dict of PyTorch is needed'
    if '[Content_Types].xml' in names:
        return 'an office document'
    inside = [name for name in names if name.endswith(('.pth', '.pt', '.ckpt', '.bin', '.safetensors', '.tar'))]
    return f'a zip archive of other files ({", ".join((inside or names)[:3])}); unpack it'


def kind_of_text(path: Path) -> str:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return 'a text file and not a checkpoint'
    if isinstance(content, dict) and 'weight_map' in content:
        return (f'an index of weights in several files ({", ".join(sorted(set(content["weight_map"].values()))[:3])}); '
                f'save them as one')
    return 'a JSON file and not a checkpoint'
