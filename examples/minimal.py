"""Train a small network with SAM: `python examples/minimal.py`, some seconds on a CPU."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sharpkern as sk

torch.manual_seed(0)

# Points in 20 dimensions, labelled by a random network; of the training labels one in five is wrong.
x = torch.randn(4000, 20)
y = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 4))(2 * x).argmax(1)
train_x, train_y, test_x, test_y = x[:2000], y[:2000], x[2000:], y[2000:]
train_y = torch.where(torch.rand(2000) < 0.2, (train_y + 1) % 4, train_y)

model = nn.Sequential(nn.Linear(20, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 4))
# model=: after a step its batch statistics are what the first pass left, at the weights themselves.
opt = sk.SAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.1, momentum=0.9, weight_decay=5e-4, model=model)
epochs = 20
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=epochs)

for _ in range(epochs):
    for batch in torch.randperm(2000).split(100):

        def closure(batch=batch):
            loss = cross_entropy(model(train_x[batch]), train_y[batch])
            loss.backward()
            return loss

        loss = opt.step(closure)  # calls the closure twice, returns the first loss
    schedule.step()

model.eval()
with torch.no_grad():
    accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
print(f"last training loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
