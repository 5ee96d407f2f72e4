"""Train on several GPUs. Copy this file beside unet.py, let `train` download the data once, and run

    torchrun --nproc_per_node=4 several.py data

The gradients are averaged over the workers: four of them with batches of 8 take the steps of one with
32 images, so a larger learning rate may pay. BatchNorm uses the images of its own worker, unless
torch.nn.SyncBatchNorm.convert_sync_batchnorm joins them."""
import os, sys, torch, unet

data, size, base, epochs = sys.argv[1], 128, 64, 5
if torch.cuda.is_available():
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # a GPU for each worker
torch.distributed.init_process_group()

train_set = unet.PetDataset(unet.open_pairs(data, "trainval"), size, mirror=True)
sampler = torch.utils.data.DistributedSampler(train_set)  # a share of the images for each worker
loader = unet.DataLoader(train_set, 8, sampler=sampler)
net = torch.nn.parallel.DistributedDataParallel(unet.UNet(base=base).to(unet.DEVICE))
optimizer = torch.optim.AdamW(net.parameters(), betas=(0.5, 0.99))
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 1e-3, epochs * len(loader), anneal_strategy="linear", cycle_momentum=False)

history = []
for epoch in range(epochs):
    sampler.set_epoch(epoch)  # another order
    history.append({"train loss": unet.train_epoch(net, loader, optimizer, schedule)})
    if torch.distributed.get_rank() == 0:
        unet.save("unet.pt", net.module, data=data, size=size, base=base, history=history)
torch.distributed.destroy_process_group()
