"""One family behind the real MoEServer: the class that Ray Serve runs, its OpenAI application, its board, without Ray.

What Ray would do is done here: the server is made and awaited, its application is called as ASGI, the board is an
object of this process instead of an actor, nothing is reserved. Engine core and ranks are processes as always.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import families

MODEL = "family"


async def serve(checkpoint: str, family: str, dtype: str, path: Path) -> dict[str, Any]:
    """Start the server, ask it unlimited and capped, and tell what clients, board and ranks saw."""
    import aiohttp
    import httpx
    from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig

    from moe_core.clock import SystemClock
    from moe_core.config import ServingConfig
    from moe_core.passes import Passes
    from moe_core.signing import Signer
    from moe_core.wire import ExpertKnobs, Knobs
    from moe_serving import builder
    from moe_serving.board import Board
    from moe_serving.server import MoEServer

    signer = Signer.generate()
    passes = Passes(signer, SystemClock())
    deployment = f"default/{family.replace('_', '-')}"
    config = ServingConfig(
        deployment=deployment,
        model=MODEL,
        source=checkpoint,
        tensor_parallel=2,
        dtype=dtype,
        max_model_len=families.LIMITS["max_model_len"],
        max_active_seqs=families.LIMITS["max_num_seqs"],
        max_batched_tokens=families.LIMITS["max_num_batched_tokens"],
        enforce_eager=True,
        prefix_caching=False,
        trusted_keys=(signer.public_pem(),),
    )
    board = Board(deployment, config.revision, list(config.trusted_keys), "127.0.0.1", 0)
    url = await board.start()

    class Server(MoEServer):
        async def _connect(self) -> Any:
            return board

    VLLMEngineConfig.get_or_create_pg = lambda self: None
    server = Server.__new__(Server)
    await server.__init__(builder.llm_config(config), serving=config.to_json())
    app = await server.__serve_build_asgi_app__()
    ranks = server._control._engine.ranks
    found: dict[str, Any] = {"phases": []}
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://replica", timeout=120)
    async with http, aiohttp.ClientSession() as session:

        async def read(what: str) -> Any:
            shown = {"Authorization": f"Bearer {passes.token(deployment)}"}
            async with session.get(url + what, headers=shown) as answer:
                return await answer.json()

        async def until(what: str, holds: Any) -> Any:
            for _ in range(500):
                if holds(answer := await read(what)):
                    return answer
                await asyncio.sleep(0.02)
            raise TimeoutError(f"{what}: {answer}")

        found["models"] = (await http.get("/v1/models")).json()
        for version, knobs in enumerate(families.KNOBS[:2], 1):
            envelope = signer.sign(
                Knobs(deployment=deployment, version=version, experts=ExpertKnobs.model_validate(knobs))
            )
            async with session.post(f"{url}/v1/knobs", json=envelope.to_json()) as answer:
                phase: dict[str, Any] = {"status": answer.status}
            phase["acks"] = await until(f"/v1/acks?version={version}", lambda acks: acks["complete"])
            phase["before"] = await ranks("moestack_read", True)
            await ranks("moestack_record", 100_000)
            body = {"model": MODEL, "prompt": families.PROMPTS, "max_tokens": families.MAX_TOKENS, "temperature": 0}
            phase["answer"] = (
                await http.post("/v1/completions", json={**body, "ignore_eos": True, "return_token_ids": True})
            ).json()
            await ranks("moestack_record", 0, f"{path}.phase{version - 1}")
            phase["after"] = await ranks("moestack_read", False)
            seen = {layer["layer"]: layer["tokens"] for layer in phase["after"][0]["layers"]}
            phase["digest"] = (
                await until(
                    "/v1/digests",
                    lambda all_of, seen=seen, version=version: (
                        all_of
                        and all_of[0]["knobsVersion"] == version
                        and {layer["layer"]: layer["tokensTotal"] for layer in all_of[0]["layers"]} == seen
                    ),
                )
            )[0]
            phase["matrix"] = (await read("/v1/experts"))[0]
            found["phases"].append(phase)
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}
        found["chat"] = (await http.post("/v1/chat/completions", json={**chat, "ignore_eos": True})).text
    server._link.cancel()
    await asyncio.gather(server._link, return_exceptions=True)
    server.engine._engine_client.shutdown()
    await board.close()
    return found
