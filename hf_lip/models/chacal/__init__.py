# SPDX-License-Identifier: Apache-2.0
"""The chacal family: decoders whose attention follows chains of any length; configuration, cache layers, models."""
