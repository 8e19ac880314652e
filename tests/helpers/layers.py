"""Statistics of single layers, made of given sums."""

import torch

from lora_kernels.statistics import FisherDiagonal, GradientSketch, LayerStatistics, WeightGradient


def layer_statistics(name, out_features, in_features, *sums):
    by_name = {part.statistic: part for part in sums}
    return LayerStatistics(name=name, in_features=in_features, out_features=out_features, sums=by_name)


def weight_gradient(gradient, tokens=1):
    sums = WeightGradient(*gradient.shape, gradient.device, gradient.dtype)
    sums.total.copy_(gradient)
    sums.count += tokens
    return sums


def fisher_diagonal(fisher, tokens=1):
    sums = FisherDiagonal(len(fisher), fisher.device, fisher.dtype)
    sums.total.copy_(fisher)
    sums.count += tokens
    return sums


def gradient_layer(name, gradient):
    return layer_statistics(name, *gradient.shape, weight_gradient(gradient))


def sketched_gradient_layer(name, g, x, size, seed=3, stream=5):
    m, n = g.shape[-1], x.shape[-1]
    sums = GradientSketch(m, n, torch.device("cpu"), size=size, co_size=2 * size, seed=seed, stream=stream)
    sums.update(g, x)
    sums.count += g.shape[0]
    return layer_statistics(name, m, n, sums)
