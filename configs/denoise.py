# Colour denoising, Gaussian noise of sigma 25, SwinIR-M: the authors' recipe (KAIR's options).
#
#   torchrun --nproc_per_node=8 train.py configs/denoise.py --dataroot_gt=DIV2K,Flickr2K,WED --val_gt=CBSD68
#
# Published: 31.78 dB on CBSD68 (PSNR, RGB, border 0). Sigma 15: --sigma=15; the authors fine-tuned 25 and 50
# from 15, with half the iterations and half the lr. Not trained here.
name = "denoise_color25"
degradation, sigma = "noise", 25
gt_size, batch_size = 128, 8
embed_dim, depths, num_heads, window_size, mlp_ratio = 180, (6,) * 6, (6,) * 6, 8, 2
loss, lr, total_iters = "charbonnier", 2e-4, 1_600_000
milestones, gamma = (800_000, 1_200_000, 1_400_000, 1_500_000), 0.5
