"""The stages of a measurement, a file each: functions that give rows for the record, the most valuable first."""
# SPDX-License-Identifier: Apache-2.0
