"""Prediction of the rotation of pictures: a whole training program of another task, counted in iterations."""
import torch

import xcit
from engine import train_one_epoch
from loaders import batches, class_folders, transforms
from run import assembly, commandline, flags, parts, training


def parse_args(argv=None):
    parser = commandline.Parser(description=__doc__)
    flags.add_iteration_flags(flags.add_run_group(parser), iterations=10, every=4)
    for add in flags.add_batch_flags, flags.add_data_path_flag, flags.add_loader_flags, flags.add_distributed_flags:
        add(parser)
    return flags.check_run_flags(parser.parse_args(argv))


def main(argv=None):
    args = parse_args(argv)
    with flags.joined(args) as device:
        model = xcit.xcit_nano_12_p16(num_classes=4, depth=2, drop_path_rate=.3).to(device)
        data = class_folders.ClassFolders(args.data_path, transforms.ToNormalizedTensor())
        sgd, scaler = torch.optim.SGD(model.parameters(), lr=.01, momentum=.9), flags.build_scaler(args, device)
        factor = parts.Metrics(value=1.)  # a part of this task: a factor of the loss, which decreases
        run = training.Run(args, flags.iterations(args), dict(model=model, optimizer=sgd, factor=factor, scaler=scaler))
        loader = batches.Rounds(batches.build_train_loader(data, flags.loading(args, device)), run.position)
        def losses(batch):
            turn, factor['value'] = torch.randint(4, (1,), device=device), factor['value'] * .9
            logits = ddp(batch[0].rot90(int(turn), (2, 3)))
            return {'rotation': factor['value'] * torch.nn.functional.cross_entropy(logits, turn.repeat(len(logits)))}
        with run.resumed():
            ddp = assembly.prepare(model, device, sync_bn=args.sync_bn)
            with run.started({'device': str(device)}):
                for number in run.rounds(loader):
                    stats = train_one_epoch(ddp, losses, loader, optimizer=sgd, **run.options(number, device, scaler))
                    run.finish(number, stats, keep=['best_model.pth'], summary={'loss': f'{stats["loss"]:.4f}'})


if __name__ == '__main__':
    commandline.run_program(main)
