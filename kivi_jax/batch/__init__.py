"""Batch jobs: files of requests in, files of results out, to be killed and started again at any moment."""
