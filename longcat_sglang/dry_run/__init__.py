"""SGLang on the null GPU: one rank of a deployment, built and stepped by SGLang's own model runner."""
# SPDX-License-Identifier: Apache-2.0
