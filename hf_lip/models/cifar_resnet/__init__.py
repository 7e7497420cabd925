# SPDX-License-Identifier: Apache-2.0
"""The cifar_resnet family: config, model, image classifier. Ordinary networks, certified by randomized smoothing."""
