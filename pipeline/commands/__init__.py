"""The commands of `refinery`, by what they are about; `pipeline.cli` puts them together."""
