# A small colour denoiser (Gaussian noise, sigma 25) for a laptop: minutes on two CPU cores, no data needed.
#
#   python train.py configs/tiny.py                                                      # synthetic images
#   python train.py configs/tiny.py --name=photos --dataroot_gt=BSD400 --val_gt=CBSD68   # photographs
#
# --scale=2, 3 or 4 makes it a small network for super-resolution, --in_chans=1 a gray one.
name = lambda cfg: f"tiny_x{cfg.scale}" if cfg.scale > 1 else "tiny"
batch_size, num_workers, gt_size = 4, 0, lambda cfg: 40 * cfg.scale
embed_dim, depths, num_heads, window_size, mlp_ratio = 48, (2, 2, 2), (1, 1, 1), 8, 2
resi_connection, drop_path_rate, init_std = "3conv", 0.0, 0.1
total_iters, lr, betas, loss = 4200, 1.5e-3, (0.9, 0.99), "mse"
scheduler, warmup_iters, grad_clip = "cosine", 100, 0.05
print_freq, val_freq, save_checkpoint_freq = 300, 4200, 1050
upsampler = lambda cfg: "pixelshuffledirect" if cfg.scale > 1 else ""
degradation = lambda cfg: "bicubic" if cfg.scale > 1 else "noise"
test_y_channel, crop_border = lambda cfg: cfg.scale > 1, lambda cfg: cfg.scale * (cfg.scale > 1)
