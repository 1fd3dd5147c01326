"""Parts of both engine packages: an engine with its versions, hooks, options, diagnosis."""
# SPDX-License-Identifier: Apache-2.0
