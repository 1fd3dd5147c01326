"""vLLM on the null GPU: one rank of any deployment, built and stepped by vLLM's own engine, for `longcat dry-run`."""
# SPDX-License-Identifier: Apache-2.0
