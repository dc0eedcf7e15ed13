"""Oblivious transfer between a server that sends and a client that chooses."""

from otpipe.ot.channel import Channel
from otpipe.ot.local_channel import LocalChannel, local_channels
from otpipe.ot.params import DEFAULT_OT_PARAMS, OtParams
from otpipe.ot.receiver import OtReceiver
from otpipe.ot.requests import (
    ReceiveChosen,
    ReceiveCorrelated,
    ReceiveOneOfMany,
    SendChosen,
    SendCorrelated,
    SendOneOfMany,
)
from otpipe.ot.sender import OtSender
from otpipe.ot.stock import Stock

__all__ = [
    "DEFAULT_OT_PARAMS",
    "Channel",
    "LocalChannel",
    "OtParams",
    "OtReceiver",
    "OtSender",
    "ReceiveChosen",
    "ReceiveCorrelated",
    "ReceiveOneOfMany",
    "SendChosen",
    "SendCorrelated",
    "SendOneOfMany",
    "Stock",
    "local_channels",
]
