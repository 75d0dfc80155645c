# Colour denoising, Gaussian noise of sigma 25, SwinIR-M: the authors' recipe (KAIR's options).
#
#   torchrun --nproc_per_node=8 train.py configs/denoise.py --dataroot_gt=DIV2K,Flickr2K,WED --val_gt=CBSD68
#
# They trained sigma 25 and 50 from 15: --sigma=50 --pretrain_network=FILE, which halves the iterations and
# the lr. Published on CBSD68 (PSNR, RGB, border 0): sigma 15 34.42, 25 31.78, 50 28.56 dB. Not trained here.
# Measured: 26 to 37 s a step on two CPU cores (bfloat16), 480 days or more: for GPUs; not run on one.
import numpy as np

name = lambda cfg: "denoise_color" + "-".join(f"{n:g}" for n in np.ravel(cfg.sigma))  # 25, 0-50
degradation, sigma = "noise", 25
gt_size, batch_size = 128, 8
embed_dim, depths, num_heads, window_size, mlp_ratio = 180, (6,) * 6, (6,) * 6, 8, 2
loss = "charbonnier"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 800_000 if cfg.pretrain_network else 1_600_000
milestones, gamma = lambda cfg: tuple(cfg.total_iters * n // 16 for n in (8, 12, 14, 15)), 0.5
