"""Losses and metrics. Each returns one value per picture ([N]), a function of that row alone.

pixel.py: mse, psnr. structure.py: ssim, ms_ssim. perceptual.py: LPIPS or our trunk distance.
identity.py: cosine of face embeddings, by dlib_face.py's network or ArcFace.
frechet.py compares whole sets and returns one number.
"""
