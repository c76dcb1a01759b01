"""Bytes between servers: sessions and their settings, COPY, and second tries.

URLs and statements come in; sessions and blocks of rows go out.
"""
