# SPDX-License-Identifier: Apache-2.0
"""Teach a small model what a big one knows."""
