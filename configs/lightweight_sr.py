# Lightweight super-resolution, bicubic x2 (--scale=3, 4 for the others), SwinIR-S: the authors'
# recipe.
#
#   python train.py configs/lightweight_sr.py --dataroot_gt=DIV2K_HR --val_gt=Set5
#
# They trained x3 and x4 from x2: --scale=4 --pretrain_network=FILE --strict_load=False, which
# halves the iterations and the lr. Published on Set5 (Y, border = scale): x2 38.14, x3 34.62,
# x4 32.44 dB. Low-resolution images are made by MATLAB's imresize unless dataroot_lq names them.
# Not trained here. It needs a GPU: on two CPU cores a step takes a quarter of a minute.
name = lambda cfg: f"lightweight_sr_x{cfg.scale}"
scale = 2
degradation = "bicubic"
gt_size = lambda cfg: 64 * cfg.scale
batch_size = 64

embed_dim = 60
depths = (6, 6, 6, 6)
num_heads = (6, 6, 6, 6)
window_size = 8
mlp_ratio = 2
upsampler = "pixelshuffledirect"

loss = "l1"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 250_000 if cfg.pretrain_network else 500_000
milestones = lambda cfg: tuple(cfg.total_iters * n // 20 for n in (10, 16, 18, 19))
gamma = 0.5

test_y_channel = True
crop_border = lambda cfg: cfg.scale
