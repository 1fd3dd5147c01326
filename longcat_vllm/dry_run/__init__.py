"""vLLM on the null GPU: one rank of any deployment, built and stepped by vLLM's own engine. `longcat dry-run` runs it."""
# SPDX-License-Identifier: Apache-2.0
