"""Adapt a frozen generator to other domains: several at once, in one batch.

config.py: what a job is. references.py: its pictures. guidance.py: what pulls a domain and what it
keeps. forms.py: what is optimised, tokens or weights. loop.py: the descent, its scores and resume.
job.py: `adapt`, from a config to domain folders.
"""
