# SPDX-License-Identifier: Apache-2.0
"""The lipschitz_vision family: config, model, backbone, image classifier, image processor."""
