"""Bytes on disk: sources, schemas, shards, codecs, manifest, commit, reader. No torch, no ray."""
