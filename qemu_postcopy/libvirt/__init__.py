"""Guests that libvirt runs: found, saved and restored without libvirt losing sight of them.

Needs libvirt-python (the extra ``libvirt``); nothing outside of this package imports it.
"""
