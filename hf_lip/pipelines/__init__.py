# SPDX-License-Identifier: Apache-2.0
"""transformers pipelines of the package."""

from hf_lip.pipelines.certify import CertifyPipeline


__all__ = ["CertifyPipeline"]
