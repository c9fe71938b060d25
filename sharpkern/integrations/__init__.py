"""Trainers of other packages, each in a module of its own that imports its package: ``accelerate``, ``ignite``,
``lightning``, ``skorch``, ``transformers``. With them every pass of a step is of all its micro-batches, gradients are
clipped in the last pass only, and gradient scalers unscale in each."""
