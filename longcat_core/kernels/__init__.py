"""Fast implementations, each of one operation, each naming the reference that it must equal."""
# SPDX-License-Identifier: Apache-2.0
