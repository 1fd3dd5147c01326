"""A decoder layer as operations and stages: what may run beside what. Data alone; imports no torch."""
# SPDX-License-Identifier: Apache-2.0
