"""Videos, read and written frame by frame, so that the memory does not grow with their length."""
from pathlib import Path
from typing import Callable, Iterable, Iterator, Tuple

from PIL import Image
from tqdm import tqdm

from run.output import shows_bar
from utils import InputError, RunStopped, first_line, whole_file

TimedPictures = Iterable[Tuple[Image.Image, int]]


def open_video(path: Path):
    """Open the file of --video as a PyAV container, which is a context; raise InputError if this fails."""
    if not path.exists():
        raise InputError(f'--video {path}: no such file')
    try:
        import av  # only videos need PyAV
    except ImportError:
        raise InputError('--video: needs PyAV, which is not installed: pip install -r requirements-video.txt') from None
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f'--video {path}: damaged, or not a video ({first_line(error)})') from None
    if not container.streams.video:
        raise InputError(f'--video {path}: has no pictures')
    container.streams.video[0].thread_type = 'AUTO'
    return container


def read_frames(container) -> Iterator[Tuple[Image.Image, int]]:
    """Yield the upright frames of a video and their times in its time base; raise InputError for a damaged frame."""
    import av
    stream, number = container.streams.video[0], -1
    try:
        for number, frame in enumerate(container.decode(stream)):
            time = frame.pts
            if time is None:  # a stream without times
                time = round(number / (stream.guessed_rate * stream.time_base))
            yield frame.to_image().rotate(frame.rotation, expand=True), time
    except av.FFmpegError as error:
        raise InputError(f'--video {container.name}: damaged at frame {number + 1} ({first_line(error)})') from None
    if number < 0:
        raise InputError(f'--video {container.name}: has no frames')


def write_video(path: Path, timed_pictures: TimedPictures, stream):
    """Encode pictures of one size, with the time base and the frame rate of the given video stream."""
    import av
    with av.open(str(path), 'w') as container:
        encoder = None
        for picture, time in timed_pictures:
            if encoder is None:
                encoder = container.add_stream('libx264', stream.guessed_rate, {'crf': '18'})
                encoder.width, encoder.height, encoder.pix_fmt = *picture.size, 'yuv420p'
                encoder.time_base = encoder.codec_context.time_base = stream.time_base
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = time, stream.time_base
            try:
                container.mux(encoder.encode(frame))
            except av.FFmpegError as error:
                raise RunStopped(f'a frame of the video can\'t be encoded ({first_line(error)})') from None
        container.mux(encoder.encode())


def check_video(path: Path):
    """Raise InputError if the first frame of a video can't be read."""
    with open_video(path) as container:
        next(read_frames(container))


def convert_video(source: Path, target: Path, convert: Callable[[TimedPictures], TimedPictures]):
    """Write the converted frames of the video `source` to the video `target`, with a progress bar."""
    with whole_file(target) as unfinished, open_video(source) as container:
        stream = container.streams.video[0]
        frames = tqdm(read_frames(container), total=stream.frames or None, unit=' frames', disable=not shows_bar())
        write_video(unfinished, convert(frames), stream)
