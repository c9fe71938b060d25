"""Fine-tune a transformer with AESAM over AdamW, under Hugging Face Accelerate.

    python -m examples.finetune_transformer
    python -m examples.finetune_transformer --optimizer AdamW
    ACCELERATE_USE_CPU=1 torchrun --nproc-per-node=2 -m examples.finetune_transformer

A small vision transformer is trained on the digits 0 to 4, which stands in for a checkpoint that would be fetched, and
fine-tuned with few images on 5 to 9. Nothing is downloaded.
"""

import argparse
import functools

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification, get_linear_schedule_with_warmup, set_seed

import sharpkern as sk
from sharpkern.integrations.accelerate import Accelerator


def digits(lowest):
    """The 8x8 images of five digits, their labels from 0 to 4."""
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    chosen = (labels >= lowest) & (labels < lowest + 5)
    return (images[chosen].float() / 8 - 1).reshape(-1, 1, 8, 8), labels[chosen] - lowest


def pretrained(epochs):
    """With a checkpoint of your own: ViTForImageClassification.from_pretrained(folder, num_labels=5)."""
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=5,
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = digits(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(64):
            opt.zero_grad()
            cross_entropy(model(x[batch]).logits, y[batch]).backward()
            opt.step()
    opt.zero_grad()
    model.classifier.reset_parameters()  # the new task has a head of its own
    return model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=["AESAM", "AdamW"], default="AESAM")
    parser.add_argument("--images", type=int, default=100, help="to fine-tune with; the rest is the test set")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--pretraining-epochs", type=int, default=10)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches a step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    set_seed(options.seed)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate, mixed_precision=options.mixed_precision)
    model = pretrained(options.pretraining_epochs)
    x, y = digits(5)
    order = torch.randperm(len(y))
    train, test = (TensorDataset(x[part], y[part]) for part in (order[: options.images], order[options.images :]))
    loader, test_loader = DataLoader(train, batch_size=10, shuffle=True), DataLoader(test, batch_size=200)

    # Optimizer steps of the whole training, on this process.
    steps = options.epochs * -(-len(loader) // (options.accumulate * accelerator.num_processes))
    adamw = dict(lr=1e-3, weight_decay=0.01)
    if options.optimizer == "AESAM":
        opt = sk.AESAM(
            model.parameters(), torch.optim.AdamW, rho=options.rho, total_steps=steps, max_grad_norm=1.0, **adamw
        )
    else:
        opt = torch.optim.AdamW(model.parameters(), **adamw)
    # A prepared scheduler moves on by one for every process.
    schedule = get_linear_schedule_with_warmup(
        opt, steps * accelerator.num_processes // 10, steps * accelerator.num_processes
    )
    model, opt, loader, test_loader, schedule = accelerator.prepare(model, opt, loader, test_loader, schedule)

    def closure(x, y):
        loss = cross_entropy(model(x).logits, y)
        accelerator.backward(loss)
        return loss

    model.train()
    for _ in range(options.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                if options.optimizer == "AESAM":
                    opt.step(functools.partial(closure, x, y))  # for every micro-batch
                else:
                    closure(x, y)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    opt.step()
                    opt.zero_grad()
                schedule.step()

    model.eval()
    right = []
    for x, y in test_loader:
        with torch.no_grad():
            predicted = model(x).logits.argmax(1)
        right.append(accelerator.gather_for_metrics(predicted == y))
    accuracy = 100 * torch.cat(right).float().mean().item()
    accelerator.print(f"{options.optimizer}: {accuracy:.2f} % of {len(test)} test images after {steps} steps")
    if options.optimizer == "AESAM":
        share = float(opt.optimizer.stats["second_passes"]) / float(opt.optimizer.stats["steps"])
        accelerator.print(f"{100 * share:.0f} % of the steps took a second pass")


if __name__ == "__main__":
    main()
