"""Makes what is bundled beside the encoders: the perceptual trunk, the CLIP, the attribute scorer.

Also the labels and captions that they learn from, and the release of a finished generator.
"""
