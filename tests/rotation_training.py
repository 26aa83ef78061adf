"""Learn which way pictures are turned: a whole training of another task, counted in iterations."""
import torch

import datasets
import xcit
from engine import train_one_epoch
from loaders.batches import Rounds, build_train_loader
from run import commandline, flags, parts, position, processes, training


def parse_args(argv=None):
    parser = commandline.Parser(description=__doc__)
    flags.add_training_flags(parser)
    flags.add_iteration_flags(parser, iterations=10, every=4)
    return flags.check_run_flags(parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    with processes.joined(args) as device:
        data = datasets.ClassFolders(args.data_path, datasets.ToNormalizedTensor())
        model = xcit.xcit_nano_12_p16(num_classes=4, depth=2, drop_path_rate=.3).to(device)
        wrapped = processes.wrap_for_distributed(model, device, sync_bn=args.sync_bn)
        optimizer = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9)
        eager = parts.Metrics(left=1.)  # a part of its own: what is learnt becomes less
        run = training.Run(args, position.Iterations(args), dict(
            model=model, optimizer=optimizer, eager=eager, scaler=flags.build_scaler(args, device)))
        loader = Rounds(build_train_loader(data, args, device), run.position)
        def losses(batch):
            turn, eager['left'] = torch.randint(4, (1,), device=device), eager['left'] * .9
            logits = wrapped(batch[0].rot90(int(turn), (2, 3)))
            return {'rotation': eager['left'] * torch.nn.functional.cross_entropy(logits, turn.repeat(len(logits)))}
        with run.under_way({}):
            for number in run.rounds(loader):
                stats = train_one_epoch(wrapped, losses, loader, optimizer=optimizer, **run.options(number, device))
                run.finish(number, stats, best=True, summary={'loss': f'{stats["loss"]:.4f}'})


if __name__ == '__main__':
    commandline.run_program(main)
