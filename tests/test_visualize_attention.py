"""tools.visualize_attention: number, position and colours of the maps, for pictures of any size and for videos."""
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import REFERENCE, ROOT, seeded_model, write_image
from PIL import Image

from inference.pictures import drawing_side
from inference.video import read_frames
from reports import maps
from reports.maps import color_table, enlarge
from tools import visualize_attention
from tools.visualize_attention import contact_sheet, main
from utils import InputError, RunStopped

PICTURE = REFERENCE / 'pattern.png'  # 420 x 300


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> dict:
    """Files of weights without a head, like backbones of DINO."""
    folder = tmp_path_factory.mktemp('weights')
    for name in ('xcit_nano_12_p16', 'xcit_nano_12_p8'):
        torch.save(seeded_model(name, num_classes=0).state_dict(), folder / f'{name}.pth')
    return {path.stem: path for path in folder.iterdir()}


def draw(weights: dict, output_dir: Path, *argv, model: str = 'xcit_nano_12_p16'):
    return main(['--model', model, '--pretrained', str(weights[model]), '--device', 'cpu',
                 '--output-dir', str(output_dir), *map(str, argv)])


def refused(argv: list, *words: str):
    with pytest.raises(InputError) as caught:
        main(list(map(str, argv)))
    assert '\n' not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def files(folder: Path) -> set:
    return {path.name for path in folder.iterdir()}


# ----- pictures

def test_a_picture_gives_a_map_of_each_head_their_mean_and_a_sheet(weights, tmp_path):
    """Four heads give four maps, the mean and the sheet, which `main` returns, and no other file."""
    assert draw(weights, tmp_path, PICTURE, '--input-size', 100) == [tmp_path / 'pattern_sheet.png']
    assert files(tmp_path) == {f'pattern_{name}.png' for name in ('head0', 'head1', 'head2', 'head3', 'mean', 'sheet')}


@pytest.mark.parametrize('model', ['xcit_nano_12_p16', 'xcit_nano_12_p8'])
@pytest.mark.parametrize('size', [(100, 37), (33, 90), (64, 64), (200, 1)])
def test_maps_have_the_pictures_shape(model, size, weights, tmp_path):
    """The longer side is --input-size, the aspect ratio is kept for each patch size, and every map is painted."""
    write_image(tmp_path / 'a.png', size=size)
    draw(weights, tmp_path / 'out', tmp_path / 'a.png', '--input-size', 120, model=model)
    expected = tuple(max(1, round(side * 120 / max(size))) for side in size)
    for name in ('head0', 'head3', 'mean'):
        image = Image.open(tmp_path / 'out' / f'a_{name}.png')
        assert image.size == expected
        assert len(image.getcolors(2 ** 20)) > 10


@pytest.mark.parametrize(('own', 'side'), [(32, 32), (96, 438), (224, 1024), (384, 1024)])
def test_size_is_that_of_the_model(own, side):
    """Attention is drawn at 1024 pixels by default, and in proportion for models of smaller pictures."""
    assert drawing_side(own, visualize_attention.LONGER_SIDE) == side


def test_model_of_small_pictures_draws_small_maps(tmp_path):
    """Without --input-size, the maps of a model of 32 pixels have 32 pixels."""
    model = seeded_model('xcit_nano_12_p16', num_classes=3)
    torch.save({'model': model.state_dict(), 'args': {'model': 'xcit_nano_12_p16', 'input_size': 32}},
               tmp_path / 'run.pth')
    main([str(PICTURE), '--pretrained', str(tmp_path / 'run.pth'), '--output-dir', str(tmp_path), '--device', 'cpu'])
    assert Image.open(tmp_path / 'pattern_mean.png').size == (32, 23)


def test_raw_attention_is_that_of_the_models_own_forward(weights, tmp_path):
    """Raw attention (heads, H, W) times the values gives the CLS token of the class attention."""
    draw(weights, tmp_path, PICTURE, '--input-size', 100, '--save-raw')
    raw = torch.from_numpy(np.load(tmp_path / 'pattern_attention.npy'))
    assert (raw.shape, raw.dtype) == ((4, 5, 7), torch.float32)
    picture = Image.open(PICTURE).convert('RGB').resize((100, 71), Image.Resampling.BICUBIC)
    mean, std = torch.tensor([.485, .456, .406]), torch.tensor([.229, .224, .225])
    pixels = (torch.tensor(np.asarray(picture)) / 255 - mean) / std
    model = seeded_model('xcit_nano_12_p16', num_classes=0).eval()
    attn = model.cls_attn_blocks[-1].attn
    seen = {}
    attn.register_forward_hook(lambda module, args, output: seen.update(x=args[0][0], cls=output[0, 0]))
    with torch.no_grad():
        model(pixels.permute(2, 0, 1)[None])
        values = attn.qkv(seen['x'])[:, 256:].unflatten(1, (4, 32))  # (1 + N, h, d)
        to_itself = 1 - raw.flatten(1).sum(dim=1)
        everything = torch.cat((to_itself[:, None], raw.flatten(1)), dim=1)
        cls = attn.proj(torch.einsum('hn,nhd->hd', everything, values).flatten())
    torch.testing.assert_close(cls, seen['cls'], rtol=0, atol=1e-4)


def test_heads_are_chosen(weights, tmp_path):
    """Only the chosen heads are drawn and averaged, under their own numbers."""
    draw(weights, tmp_path / 'two', PICTURE, '--input-size', 64, '--heads', '3,1', '--save-raw')
    draw(weights, tmp_path / 'all', PICTURE, '--input-size', 64, '--save-raw')
    draw(weights, tmp_path / 'one', PICTURE, '--input-size', 64, '--heads', '3')
    assert {'pattern_head1.png', 'pattern_head3.png'} == {n for n in files(tmp_path / 'two') if 'head' in n}
    two, every = (np.load(tmp_path / name / 'pattern_attention.npy') for name in ('two', 'all'))
    np.testing.assert_array_equal(two, every[[3, 1]])
    head_3 = tmp_path / 'one'
    assert (head_3 / 'pattern_mean.png').read_bytes() == (head_3 / 'pattern_head3.png').read_bytes()
    assert (head_3 / 'pattern_mean.png').read_bytes() != (tmp_path / 'all' / 'pattern_mean.png').read_bytes()


def test_layer_is_chosen(weights, tmp_path):
    """Block 1 of two is the default; block 0 has other attention."""
    for layer in (0, 1, -1):
        draw(weights, tmp_path / str(layer), PICTURE, '--input-size', 64, '--save-raw', '--layer', layer)
    first, last, default = (np.load(tmp_path / name / 'pattern_attention.npy') for name in ('0', '1', '-1'))
    np.testing.assert_array_equal(last, default)
    assert np.abs(first - last).max() > 1e-3


def test_equal_stems_do_not_overwrite_each_other(weights, tmp_path):
    """Pictures of equal names in several folders or formats, and one with a number in its name, are all kept."""
    paths = [tmp_path / name for name in ('a/x.png', 'b/x.png', 'b/X.jpg', 'b/x-2.png')]
    for seed, path in enumerate(paths):
        write_image(path, seed=seed)
    sheets = draw(weights, tmp_path / 'out', *paths, '--input-size', 32)
    assert [path.name for path in sheets] == ['x_sheet.png', 'x-2_sheet.png', 'X-3_sheet.png', 'x-2-2_sheet.png']
    assert len({path.read_bytes() for path in sheets}) == 4


def test_folders_and_cameras_rotation(weights, tmp_path):
    """Images in a folder are drawn, turned by their EXIF orientation."""
    write_image(tmp_path / 'in/a.jpg', size=(64, 32))
    image = Image.open(tmp_path / 'in/a.jpg')
    image.getexif()[0x112] = 6  # a quarter turn
    image.save(tmp_path / 'in/a.jpg', exif=image.getexif())
    draw(weights, tmp_path / 'out', tmp_path / 'in', '--input-size', 64)
    assert Image.open(tmp_path / 'out/a_mean.png').size == (32, 64)


def test_attention_is_drawn_where_the_token_looks():
    """The colour of token (i, j) is at pixel (i * patch, j * patch), the centre of its receptive field."""
    model = seeded_model('xcit_nano_12_p16').eval()
    image = torch.zeros(1, 3, 200, 230, requires_grad=True)
    model.patch_embed(image)[0, :, 5, 7].square().sum().backward()
    pull = image.grad[0].abs().sum(dim=0)
    centre = [(pull.sum(dim=1 - axis) * torch.arange(pull.shape[axis])).sum() / pull.sum() for axis in (0, 1)]
    token = torch.zeros(13, 15)
    token[5, 7] = 1
    drawn = enlarge(token, (230, 200), 16)
    assert drawn.shape == (200, 230)
    peak = divmod(int(drawn.argmax()), 230)
    assert peak == (80, 112)
    assert peak == pytest.approx(torch.stack(centre).tolist(), abs=2)


def test_enlarged_maps_are_smooth():
    """Between tokens the values change in small steps, without the edges of squares."""
    rows = enlarge(torch.tensor([[0., 1.], [0., 1.]]), (17, 17), 16)
    assert rows.diff(dim=1).abs().max() < .12


def test_colors_get_lighter_evenly():
    """CIE lightness rises along the colour table in nearly equal steps, from black to light."""
    rgb = color_table() / 255
    linear = np.where(rgb <= .04045, rgb / 12.92, ((rgb + .055) / 1.055) ** 2.4)
    luminance = linear @ [.2126, .7152, .0722]
    lightness = np.where(luminance > .008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    assert lightness[0] < 2
    assert lightness[-1] > 95
    in_tens = np.diff(lightness[::16])
    assert in_tens.min() > 3
    assert in_tens.max() < 10


def test_one_hot_patch_does_not_darken_the_rest():
    """A patch with a thousand times the attention of any other does not change the others' colours."""
    values = torch.linspace(0, 1, 400).reshape(20, 20)
    hot = values.clone()
    hot[10, 10] = 1000
    picture = Image.new('RGB', (320, 320))
    images = [np.asarray(visualize_attention.paint(picture, w, visualize_attention.color_scale([w]), 16), dtype=int)
              for w in (values, hot)]
    far = [image[240:] for image in images]  # more than two patches away
    assert np.abs(far[0] - far[1]).max() < 10


def test_uniform_attention_is_painted():
    """A uniform map has one colour, which is of medium brightness."""
    scale = visualize_attention.color_scale([torch.ones(2, 2)])
    assert scale.tolist() == [0., 2.]
    flat = visualize_attention.paint(Image.new('RGB', (32, 32)), torch.ones(2, 2), scale, 16)
    (_, color), = flat.getcolors()
    assert color == tuple(round(.6 * value) for value in color_table()[127])


def test_all_maps_have_one_scale():
    """A nearly uniform map has nearly one colour beside a map of strong attention."""
    nearly, strong = torch.linspace(.9, 1.1, 64).reshape(8, 8), torch.linspace(.5, 4.8, 64).reshape(8, 8)
    scale = visualize_attention.color_scale([nearly, strong])
    assert 4 < scale[1] < 4.8
    painted = [np.asarray(visualize_attention.paint(Image.new('RGB', (64, 64)), values, scale, 8), dtype=int)
               for values in (nearly, strong)]
    ranges = [np.ptp(picture, axis=(0, 1)).max() for picture in painted]
    assert ranges[0] < 20 < 120 < ranges[1]


def test_sheet_has_the_files_name(weights, tmp_path, monkeypatch):
    """The picture on the sheet has the name of its file."""
    tiles = []
    monkeypatch.setattr(visualize_attention, 'contact_sheet', lambda front, *args: (
        tiles.extend(front), Image.new('RGB', (1, 1)))[1])
    write_image(tmp_path / 'é  1.png')
    draw(weights, tmp_path / 'out', tmp_path / 'é  1.png', '--input-size', 32)
    assert [tile.name for tile in tiles] == ['é␣␣1.png', 'mean of 4 heads']


@pytest.mark.parametrize('size', [(300, 200), (200, 300), (1000, 30), (30, 1000), (1, 1000)])
@pytest.mark.parametrize('heads', [1, 3, 4, 16])
def test_sheet_is_readable(size, heads):
    """A sheet has a limited size and a white border, and every tile is complete."""
    colors = [(250 - 10 * i, 20 + 3 * i, 40) for i in range(heads + 2)]
    tiles = [visualize_attention.Tile(Image.new('RGB', size, c), 'head 15', '0.3 to 12.5 x uniform') for c in colors]
    sheet = contact_sheet(tiles[:2], tiles[2:], np.array([0., 12.5]))
    assert 900 < max(sheet.size) < 3000
    counts = {color: count for count, color in sheet.getcolors(sheet.width * sheet.height)}
    areas = [counts[color] for color in colors]
    assert areas[0] == areas[1]
    assert len(set(areas[2:])) == 1
    border = np.array(sheet)
    border[20:-20, 20:-20] = 255
    assert (border == 255).all()


def test_training_checkpoint_needs_no_model_name(tmp_path):
    """The model of a training checkpoint is named in the file, and its head is ignored."""
    model = seeded_model('xcit_nano_12_p16', num_classes=3)
    torch.save({'model': model.state_dict(), 'args': {'model': 'xcit_nano_12_p16'}}, tmp_path / 'run.pth')
    main([str(PICTURE), '--pretrained', str(tmp_path / 'run.pth'), '--output-dir', str(tmp_path / 'out'),
          '--input-size', '32', '--device', 'cpu'])
    assert (tmp_path / 'out' / 'pattern_sheet.png').exists()


# ----- videos

RATE = Fraction(30000, 1001)


def write_video(path: Path, *, times=range(12), size=(64, 48)):
    """Write a video of a bright square moving over smooth random colours, a frame per time in units of 1 / RATE."""
    write_image(path.with_suffix('.png'), size=size)
    background = Image.open(path.with_suffix('.png'))
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', RATE, {'crf': '5'})
        stream.width, stream.height, stream.pix_fmt = *size, 'yuv420p'
        for i, time in enumerate(times):
            picture = background.copy()
            picture.paste((255, 255, 255), (4 * i % 48, 20, 4 * i % 48 + 12, 32))
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = time, 1 / RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video(path: Path) -> tuple:
    """Return frame rate, times in seconds, and pictures."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        pictures, times = zip(*read_frames(container))
        return stream.average_rate, [float(time * stream.time_base) for time in times], pictures


@pytest.mark.parametrize('times', [range(12), [0, 1, 2, 6, 7, 20]], ids=['even', 'uneven'])
def test_video_keeps_its_frames_and_times(times, weights, tmp_path):
    """The video has the same frames, times and rate, and twice the width."""
    write_video(tmp_path / 'in.mp4', times=times)
    path = draw(weights, tmp_path / 'out', '--video', tmp_path / 'in.mp4', '--input-size', 80)
    assert path == tmp_path / 'out' / 'in_attention.mp4'
    assert files(tmp_path / 'out') == {'in_attention.mp4'}
    rate, seconds, pictures = read_video(path)
    expected_rate, expected_seconds, _ = read_video(tmp_path / 'in.mp4')
    assert rate == expected_rate
    assert seconds == pytest.approx(expected_seconds, abs=1e-6)
    assert {picture.size for picture in pictures} == {(160, 60)}


def test_video_shows_the_picture_beside_its_attention(weights, tmp_path):
    """The left half is the frame; the right half is its map, which changes with the frames."""
    write_video(tmp_path / 'in.mp4')
    _, _, before = read_video(tmp_path / 'in.mp4')
    _, _, after = read_video(draw(weights, tmp_path, '--video', tmp_path / 'in.mp4', '--input-size', 64))
    left = [np.asarray(picture.crop((0, 0, 64, 48)), dtype=int) for picture in after]
    for frame, copy in zip(before, left):
        assert np.abs(np.asarray(frame, dtype=int) - copy).mean() < 6
    right = [np.asarray(picture.crop((64, 0, 128, 48)), dtype=int) for picture in after]
    assert np.abs(right[0] - left[0]).mean() > 20
    assert np.abs(right[0] - right[-1]).mean() > 2


def test_a_turned_video_is_turned(weights, tmp_path):
    """A video with a rotation in its header is turned upright."""
    write_video(tmp_path / 'in.mp4', times=range(2))
    # The matrix in an MP4's track header, which comes after the one of the movie: a quarter turn to the left
    upright, turned = (struct.pack('>9i', *(0x10000 * x for x in rotation), 0, 0, 0x40000000)
                       for rotation in ((1, 0, 0, 0, 1, 0), (0, -1, 0, 1, 0, 0)))
    before, _, after = (tmp_path / 'in.mp4').read_bytes().rpartition(upright)
    (tmp_path / 'in.mp4').write_bytes(before + turned + after)
    _, _, pictures = read_video(draw(weights, tmp_path, '--video', tmp_path / 'in.mp4', '--input-size', 64))
    stored = Image.open(tmp_path / 'in.png').rotate(90, expand=True)
    assert pictures[0].size == (96, 64)
    top_right = (np.asarray(image.crop((36, 4, 44, 12)), dtype=int) for image in (stored, pictures[0]))
    assert np.abs(np.subtract(*top_right)).mean() < 25


def test_video_colors_follow_slowly(weights, tmp_path, monkeypatch):
    """The colour scale keeps most of the previous frame's scale, so a flickering light does not flicker in the maps."""
    monkeypatch.setattr(maps, 'BRIGHTEST', 0.)
    attention = visualize_attention.build_attention(visualize_attention.parse_args(
        ['--video', 'x', '--model', 'xcit_nano_12_p16', '--pretrained', str(weights['xcit_nano_12_p16']),
         '--output-dir', str(tmp_path), '--device', 'cpu']))
    bright, dark = Image.open(PICTURE).convert('RGB'), Image.new('RGB', (420, 300), (30, 30, 30))
    frames = [(bright, 0), (dark, 1), (bright, 2)]
    pairs = [pair for pair, _ in visualize_attention.draw_frames(attention, frames, 128)]
    first, last = (np.asarray(pairs[i].crop((128, 0, 256, 92)), dtype=int) for i in (0, 2))
    assert not np.array_equal(first, last)
    assert np.abs(first - last).mean() < 6


# ----- bad input

def test_program_prints_one_line_and_exits_with_2(tmp_path):
    """The program refuses another model in one line with exit code 2, and makes no folder."""
    result = subprocess.run(
        [sys.executable, '-m', 'tools.visualize_attention', PICTURE, '--model', 'resnet18', '--pretrained', 'x.pth',
         '--output-dir', tmp_path / 'out'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.rstrip('\n')]
    assert ('error: --model resnet18: not an XCiT model, which this program needs; allowed: xcit_nano_12_p16'
            in result.stderr)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('argv', 'words'), [
    ([], ['images', '--video']),
    ([PICTURE, '--video', 'a.mp4'], ['images', '--video']),
    (['--video', 'a.mp4'], ['--video a.mp4', 'no such file']),
    (['--video', 'a.mp4', '--save-raw'], ['--save-raw', '--video']),
    (['--video', ROOT / 'main.py'], ['main.py', 'not a video']),
    (['no.png'], ['no.png', 'no such file']),
    ([ROOT / 'main.py'], ['unreadable image', 'main.py']),
    ([ROOT / 'tools'], ['tools', 'no images']),
    ([PICTURE, '--heads', '4'], ['--heads 4', 'heads 0 to 3']),
    ([PICTURE, '--heads', '0,a'], ["'0,a'", 'must be all, or']),
    ([PICTURE, '--heads', ''], ["''", 'must be all, or']),
    ([PICTURE, '--layer', '2'], ['--layer 2', 'blocks 0 to 1']),
    ([PICTURE, '--layer', '-3'], ['--layer -3', 'blocks 0 to 1']),
    ([PICTURE, '--input-size', '0'], ["'0'", '>= 1']),
    ([PICTURE, '--full-crop'], ['--full-crop']),
], ids=lambda value: ' '.join(map(str, value[1:3])) if value and value[0] == PICTURE else '')
def test_bad_flag(argv, words, weights, tmp_path):
    """A bad flag is refused with the allowed values before anything is written."""
    model = ['--model', 'xcit_nano_12_p16', '--pretrained', weights['xcit_nano_12_p16'], '--device', 'cpu']
    refused([*model, '--output-dir', tmp_path / 'out', *argv], *words)
    assert not (tmp_path / 'out').exists()


def test_other_models_checkpoint_is_refused(tmp_path):
    """A checkpoint that names another model than XCiT is refused."""
    model = seeded_model('resnet10t', num_classes=2)
    torch.save({'model': model.state_dict(), 'args': {'model': 'resnet10t'}}, tmp_path / 'run.pth')
    refused([PICTURE, '--pretrained', tmp_path / 'run.pth', '--output-dir', tmp_path / 'out'],
            'resnet10t: not an XCiT model')


def test_inputs_are_not_written_over(weights, tmp_path):
    """A picture with the name of another picture's map in the output folder is not overwritten."""
    for name in ('a.png', 'a_mean.png'):
        write_image(tmp_path / name)
    before = (tmp_path / 'a_mean.png').read_bytes()
    with pytest.raises(InputError, match='would be overwritten'):
        draw(weights, tmp_path, tmp_path / 'a.png', tmp_path / 'a_mean.png', '--input-size', 32)
    assert (tmp_path / 'a_mean.png').read_bytes() == before


def test_missing_pyav_is_named(weights, tmp_path, monkeypatch):
    """Without PyAV a video is refused with the line that installs it."""
    monkeypatch.setitem(sys.modules, 'av', None)
    (tmp_path / 'a.mp4').touch()
    refused(['--video', tmp_path / 'a.mp4', '--pretrained', weights['xcit_nano_12_p16'], '--output-dir', tmp_path],
            'pip install -r requirements-video.txt')


def test_damaged_video_is_refused(weights, tmp_path):
    """A video that ends before its first frame is refused before a folder is made."""
    write_video(tmp_path / 'whole.mkv')
    (tmp_path / 'cut.mkv').write_bytes((tmp_path / 'whole.mkv').read_bytes()[:600])
    refused(['--video', tmp_path / 'cut.mkv', '--pretrained', weights['xcit_nano_12_p16'],
             '--output-dir', tmp_path / 'out'], 'cut.mkv')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('taken', ['in_attention.mp4', 'pattern_mean.png'])
def test_what_cannot_be_written_leaves_nothing_unfinished(taken, weights, tmp_path):
    """If a directory has the name of a result, the program ends in one line and leaves no unfinished file."""
    write_video(tmp_path / 'in.mp4', times=range(2))
    (tmp_path / 'out' / taken).mkdir(parents=True)
    given = ['--video', tmp_path / 'in.mp4'] if taken.endswith('mp4') else [PICTURE]
    with pytest.raises(RunStopped, match=f"{taken} can't be written"):
        draw(weights, tmp_path / 'out', *given, '--input-size', 64)
    assert [name for name in files(tmp_path / 'out') if 'unfinished' in name] == []
