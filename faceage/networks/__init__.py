"""The networks: plain `nn.Module`s with their dimensions, and the programs that hand them to the engines."""
