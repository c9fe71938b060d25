"""The sharpness of the loss over trainings with SGD, SAM and AESAM, recorded by `SharpnessMonitor`.

    python -m examples.track_sharpness --out sharpness

Each training leaves a table (.csv), its records (.jsonl) and a picture of the largest eigenvalues (.png) in the folder.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sharpkern as sk
from experiments.data import CLASSES, load_data
from sharpkern.analysis import SharpnessMonitor


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="sharpness", help="folder for the records, made anew")
    parser.add_argument("--train-size", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--every", type=int, default=50, help="steps from one record to the next")
    options = parser.parse_args(arguments)
    data = load_data("digits", None, options.train_size, torch.device("cpu"))
    steps = options.epochs * -(-options.train_size // 50)
    sgd = dict(lr=0.05, momentum=0.9)
    optimizers = {
        "sgd": lambda params: torch.optim.SGD(params, **sgd),
        "sam": lambda params: sk.SAM(params, torch.optim.SGD, rho=0.1, **sgd),
        "aesam": lambda params: sk.AESAM(params, torch.optim.SGD, rho=0.1, total_steps=steps, **sgd),
    }
    # The loss whose curvature is recorded: that of some of the training images, the same ones each time.
    looked_at = [(data.train_x[:500], data.train_y[:500])]

    for name, make in optimizers.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, CLASSES))
        opt = make(model.parameters())

        def test_accuracy(model=model):
            with torch.no_grad():
                return {"test_accuracy": (model(data.test_x).argmax(1) == data.test_y).float().mean()}

        with SharpnessMonitor(
            opt=opt, model=model, loss_fn=cross_entropy, batches=looked_at,
            every=options.every, k=3, rho=0.1, metrics=test_accuracy, path=options.out / name,
        ) as monitor:  # fmt: skip
            monitor.record()  # before the first step
            for _ in range(options.epochs):
                for batch in torch.randperm(options.train_size).split(50):

                    def closure(batch=batch, model=model, opt=opt):
                        opt.zero_grad()
                        loss = cross_entropy(model(data.train_x[batch]), data.train_y[batch])
                        loss.backward()
                        return loss

                    opt.step(closure)
        monitor.plot(options.out / f"{name}.png")

        print(f"{name}\n  step     loss  eigenvalue  sharpness  second passes  test accuracy")
        for record in monitor.records:
            print(
                f"{record['step']:6} {record['loss']:8.4f} {record['eigenvalues'][0]:11.2f} {record['sharpness']:10.4f}"
                f" {100 * record.get('second_pass_share', 0):12.0f} % {100 * record['test_accuracy']:12.1f} %"
            )


if __name__ == "__main__":
    main()
