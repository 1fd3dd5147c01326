"""What a deployment needs before it is rented: hardware as data."""
# SPDX-License-Identifier: Apache-2.0
