"""Kinds of files that users pass as checkpoints, recognised by their content, not by their suffix."""
import string
import zipfile
from pathlib import Path

SAFETENSORS = 'safetensors'
HEAD = 512  # bytes that are examined
BEGINNINGS = {  # kinds of files by their first bytes
    b'version https://git-lfs': 'a Git-LFS pointer, not the file itself; git lfs pull downloads the file',
    b'\x1f\x8b': 'a gzip archive; unpack the archive',
    b'\x89HDF': 'an HDF5 file, as Keras writes; PyTorch weights are needed',
}
MARKUP = (b'<!doctype', b'<html', b'<head', b'<?xml', b'<!--')


def kind_of(path: Path) -> str:
    """Return SAFETENSORS, '' for a file that torch.load may read, or a description with a remedy for other files."""
    with open(path, 'rb') as file:
        head = file.read(HEAD)
    if not head:
        return 'empty: damaged, truncated or not a checkpoint'
    for beginning, kind in BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.lstrip().lower().startswith(MARKUP):
        return 'a web page, not a checkpoint; the file itself has another address'
    if len(head) > 8 and head[8:9] == b'{' and int.from_bytes(head[:8], 'little') + 8 <= path.stat().st_size:
        return SAFETENSORS
    if head[:1] == b'\x08' and head[2:3] in (b'\x12', b'\x1a', b'\x3a', b'\x42'):  # protobuf: IR version, then a field
        return 'an ONNX model, without weight names; use the checkpoint of the model'
    if zipfile.is_zipfile(path):
        return kind_of_zip(path)
    if len(head) > 16 and all(byte in string.printable.encode() for byte in head):
        return 'a text file, not a checkpoint'
    return ''


def kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return ''
    if any(name.endswith('/constants.pkl') or '/code/' in name for name in names):
        return 'a TorchScript program; use the checkpoint of the program'
    if any(name.endswith('data.pkl') for name in names):
        return ''
    weights = [name for name in names if name.endswith(('.pth', '.pt', '.ckpt', '.bin', '.safetensors', '.tar'))]
    return f'a zip archive of other files ({", ".join((weights or names)[:3])}); unpack the archive'
