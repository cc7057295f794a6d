"""The specification's examples, run against a real Redis at the default address, with names, calls and order as printed.

Where an example is a fragment it is completed; where it sleeps, the condition it sleeps for is awaited; where it would
not end, a comment says what was changed and why. ``await dispatcher.run()`` runs until ``stop()``, so the examples that
go on behind it run it as a task (:class:`~orchestra.dispatcher.Dispatcher` has ``start()`` for that).
Signatures, names and import paths are in ``test_specification_api.py``.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from orchestra import (
    BackpressureConfig,
    BackpressureRejectedError,
    BaseTask,
    Dispatcher,
    MemoryManager,
    OrchestrationWorkerPoolConfig,
    Orchestrator,
    PriorityScheduler,
    QueueWorkerPool,
    RateLimitConfig,
    RedisRateLimiter,
    RedisStreamTaskQueue,
    StepState,
    TaskPriority,
    TaskState,
    WeightedRoundRobinStrategy,
    WorkerManager,
    WorkflowEngine,
    WorkflowError,
    create_load_balancer,
    get_agent_registry,
    get_connection_manager,
    get_flow_controller,
    get_memory_manager,
    get_orchestrator,
    get_scheduler,
    get_workflow_engine,
)


@pytest.fixture(autouse=True)
async def default_redis(redis_url):
    """The default address is the test server's; its shared connections end with the test."""
    yield redis_url
    await get_connection_manager().close()


@pytest.fixture
def agents():
    """The process-wide registry, as it was before when the test is over."""
    registry = get_agent_registry()
    before = set(registry)
    yield registry
    for task_type in set(registry) - before:
        registry.unregister(task_type)
    registry.close()


async def until(condition, seconds=10.0):
    """Wait until the coroutine function ``condition`` gives something true; returns it."""
    async with asyncio.timeout(seconds):
        while not (value := await condition()):
            await asyncio.sleep(0.005)
        return value


async def drained(task_queue):
    """The statistics of ``task_queue`` once no task is live; they must add up."""

    async def empty():
        stats = await task_queue.stats()
        return stats if stats.live == 0 else None

    stats = await until(empty)
    assert stats.adds_up, stats
    return stats


# -- Component Details


async def test_dispatcher_example(agents):
    seen = []

    @agents.agent("text_classification")
    async def classify(task):
        seen.append((task.id, task.input, task.priority))

    # Initialize a dispatcher
    task_queue = RedisStreamTaskQueue("task_stream", "consumer_group")
    scheduler = PriorityScheduler()
    worker_pool = QueueWorkerPool("dispatcher_pool")
    flow_controller = get_flow_controller("dispatcher_flow")

    dispatcher = Dispatcher(
        task_queue=task_queue,
        scheduler=scheduler,
        worker_pool=worker_pool,
        flow_controller=flow_controller,
    )

    # Start the dispatcher: as a task, because run() returns only after stop()
    running = asyncio.create_task(dispatcher.run())

    # Submit a task
    task_data = {
        "id": "task-123",
        "type": "text_classification",
        "input": {"text": "Classify this text"},
        "priority": TaskPriority.HIGH.value,
    }
    await task_queue.produce(task_data)
    stats = await drained(task_queue)
    assert not running.done()

    # Stop the dispatcher when done
    await dispatcher.stop()

    await running
    assert seen == [("task-123", {"text": "Classify this text"}, TaskPriority.HIGH)]
    assert stats.counters["completed"] == 1
    assert flow_controller.metrics.acquired == 1
    await worker_pool.shutdown()
    await task_queue.close()


async def test_flow_control_example():
    # Configure and initialize a rate limiter
    config = BackpressureConfig(
        rate_limit=RateLimitConfig(rate=100.0, burst=50),
    )
    rate_limiter = RedisRateLimiter("api_limiter", config)

    # Execute a function with rate limiting
    async def process_request(request_id):
        # Process the request
        return {"status": "success", "id": request_id}

    results = []
    try:
        result = await rate_limiter.execute(
            process_request,
            "request-123",
            priority=1,  # Higher priority
            cost=2,  # Consumes 2 tokens
        )
        results.append(result)
        print(f"Request processed: {result}")
    except BackpressureRejectedError:
        print("Request rejected due to rate limiting")

    # Alternative: use as context manager
    try:
        async with rate_limiter:
            result = await process_request("request-123")
            results.append(result)
            print(f"Request processed: {result}")
    except BackpressureRejectedError:
        print("Request rejected due to rate limiting")

    assert results == [{"status": "success", "id": "request-123"}] * 2

    async def never():
        raise AssertionError("a refused call must not be made")

    while await rate_limiter.acquire():
        pass
    with pytest.raises(BackpressureRejectedError) as caught:
        await rate_limiter.execute(never, cost=40)
    assert 0 < caught.value.retry_after <= 0.5


def test_load_balancer_example():
    # Create a load balancer
    load_balancer = create_load_balancer("weighted_round_robin")

    # Set worker weights for weighted strategies
    if isinstance(load_balancer, WeightedRoundRobinStrategy):
        load_balancer.set_worker_weight("worker1", 3)  # Can handle 3x the load
        load_balancer.set_worker_weight("worker2", 1)
        load_balancer.set_worker_weight("worker3", 2)

    # Use load balancer to select a worker
    available_workers = ["worker1", "worker2", "worker3"]
    selected_worker = load_balancer.select_worker(available_workers)
    assert selected_worker in available_workers
    more = [load_balancer.select_worker(available_workers, {"type": "any"}) for _ in range(5)]
    assert Counter([selected_worker, *more]) == {"worker1": 3, "worker2": 1, "worker3": 2}

    # Update worker status based on current capacity
    load_balancer.update_worker_status("worker1", {"weight": 2})  # Reduced capacity
    later = [load_balancer.select_worker(available_workers) for _ in range(10)]
    assert Counter(later[5:]) == {"worker1": 2, "worker2": 1, "worker3": 2}


async def test_worker_pool_example(capsys):
    # Create a worker pool
    pool_config = OrchestrationWorkerPoolConfig(
        workers=4,  # Number of worker tasks
        max_queue_size=100,  # Maximum queued tasks
        max_concurrent_tasks=8,  # Maximum executing tasks
    )
    worker_pool = QueueWorkerPool("processing_pool", config=pool_config)

    # Submit tasks to the pool
    async def process_item(item_id):
        # Process the item
        print(f"Processing item {item_id}")
        return {"id": item_id, "status": "processed"}

    # Submit multiple tasks
    futures = []
    for i in range(10):
        futures.append(await worker_pool.submit(process_item, f"item-{i}"))

    # Check pool metrics
    print(f"Active workers: {worker_pool.metrics.active_workers}")
    print(f"Running tasks: {worker_pool.metrics.running_tasks}")
    print(f"Queue size: {worker_pool.get_queue_size()}")
    assert (worker_pool.get_active_workers(), worker_pool.get_running_tasks()) == (4, 0)

    # Shutdown the pool when done
    await worker_pool.shutdown(wait=True, timeout=30.0)

    assert [future.result()["id"] for future in futures] == [f"item-{i}" for i in range(10)]
    said = capsys.readouterr().out
    assert "Active workers: 4\nRunning tasks: 0\nQueue size: 10\n" in said
    assert said.count("Processing item item-") == 10


async def test_scheduler_example(capsys):
    # Initialize the scheduler
    scheduler = PriorityScheduler()

    # Add tasks with different priorities
    await scheduler.add_task({"id": "task1", "type": "data_processing", "priority": TaskPriority.HIGH.value})

    await scheduler.add_task({"id": "task2", "type": "data_processing", "priority": TaskPriority.NORMAL.value})

    await scheduler.add_task({"id": "task3", "type": "data_processing", "priority": TaskPriority.CRITICAL.value})

    # Get next task to process (will be task3 due to CRITICAL priority)
    next_task = await scheduler.get_next_task()
    print(f"Processing task: {next_task['id']}")

    # Peek at next task without removing it
    peek_task = await scheduler.peek_next_task()
    print(f"Next task in queue: {peek_task['id']}")

    # Get multiple tasks ordered by priority
    tasks = await scheduler.get_tasks_by_priority(count=10)
    print(f"Retrieved {len(tasks)} tasks")

    # Clear the scheduler if needed
    await scheduler.clear()

    assert capsys.readouterr().out == "Processing task: task3\nNext task in queue: task1\nRetrieved 2 tasks\n"
    assert [task["id"] for task in tasks] == ["task1", "task2"]
    assert scheduler.is_empty()


@pytest.mark.parametrize("works", [True, False])
async def test_task_queue_example(works):
    async def process_task(task_data):
        if not works:
            raise ValueError(f"cannot process {task_data['input']['image_url']}")

    # Initialize the task queue
    task_queue = RedisStreamTaskQueue(
        stream_name="task_stream",
        consumer_group="processing_group",
        claim_interval_ms=60000,  # Reclaim messages idle for 60 seconds
    )

    # Produce a task
    task_data = {
        "id": "task-123",
        "type": "image_processing",
        "input": {"image_url": "https://example.com/image.jpg"},
    }
    message_id = await task_queue.produce(task_data)
    print(f"Produced task with ID: {message_id}")

    # Consume tasks
    consumer_name = "worker-1"
    tasks = await task_queue.consume(
        consumer_name=consumer_name,
        count=10,
        block_ms=2000,
    )
    assert tasks == [(message_id, {**task_data, "priority": TaskPriority.NORMAL})]

    # Process tasks
    for message_id, task_data in tasks:
        try:
            # Process the task
            await process_task(task_data)

            # Acknowledge successful processing
            assert await task_queue.acknowledge(message_id)
        except Exception as e:
            # Move failed task to DLQ
            error_info = {"error": str(e), "timestamp": time.time()}
            assert await task_queue.add_to_dlq(message_id, task_data, error_info)

    assert await task_queue.acknowledge(message_id) is False, "it is settled already"
    assert await task_queue.get_queue_depth() == 0
    letters = await task_queue.read_dlq()
    assert len(letters) == (0 if works else 1)
    if not works:
        assert letters[0].task_data == task_data
        assert letters[0].error_info["error"] == "cannot process https://example.com/image.jpg"
        assert letters[0].error_info["timestamp"] == error_info["timestamp"]

    # Get a distributed lock
    lock_name = "exclusive_operation"
    async with await task_queue.get_lock(lock_name, expire_time=30):
        # Perform exclusive operation
        pass

    async with await task_queue.get_lock(lock_name, expire_time=30) as lock:
        assert lock.fence >= 2
    await task_queue.close()


async def test_orchestrator_example(agents):
    planned, done = [], []

    @agents.agent("planner")
    async def plan(task):
        planned.append(task.input["task"]["id"])
        return [{"action": "load", "args": {"of": task.input["task"]["input"]["dataset"]}}, {"action": "summarise"}]

    @agents.agent("load")
    async def load(task):
        done.append((task.type, task.input))
        return [1, 2, 3]

    @agents.agent("summarise")
    async def summarise(task):
        done.append((task.type, task.metadata["context"]["results"]))
        return {"total": sum(task.metadata["context"]["results"][0])}

    # Initialize dependencies
    task_queue = RedisStreamTaskQueue("task_stream", "orchestrator_group")
    memory_manager = MemoryManager()
    worker_pool = QueueWorkerPool("orchestrator_pool")

    # Create orchestrator
    orchestrator = Orchestrator(
        task_queue=task_queue,
        memory_manager=memory_manager,
        worker_pool=worker_pool,
    )

    # Process a task
    task_data = {
        "id": "complex-task-123",
        "type": "data_analysis",
        "input": {"dataset": "customer_data.csv"},
    }
    await orchestrator.process_incoming_task("complex-task-123", task_data)

    # The orchestrator generated a plan, executed it, tracked the progress
    assert planned == ["complex-task-123"]
    assert done == [("load", {"of": "customer_data.csv"}), ("summarise", [[1, 2, 3]])]
    state = await WorkflowEngine(memory_manager).load_workflow_state("complex-task-123")
    assert state.status is TaskState.COMPLETED
    assert state.workflow_context["final_output"] == {"total": 6}
    with pytest.raises(WorkflowError):
        await orchestrator.route_and_execute_step("complex-task-123", 0)  # it has ended
    await worker_pool.shutdown()
    await task_queue.close()


PLAN = [
    {
        "action": "fetch_data",
        "args": {"source": "database"},
        "reasoning": "Need to retrieve raw data first",
    },
    {
        "action": "transform_data",
        "args": {"format": "json"},
        "reasoning": "Transform data into required format",
    },
    {
        "action": "analyze_data",
        "args": {"method": "statistical"},
        "reasoning": "Perform statistical analysis",
    },
]


@pytest.mark.parametrize("step_failed", [False, True])
async def test_workflow_engine_example(step_failed):
    async def execute_step(step):
        return {"action": step.action, "args": step.args}

    # Initialize the workflow engine
    memory_manager = MemoryManager()
    workflow_engine = WorkflowEngine(memory_manager)

    # Define a task
    task = BaseTask(
        id="workflow-task-123",
        type="data_processing",
        input={"data": "example"},
    )

    # Define a workflow plan
    plan = PLAN

    # Initialize the workflow
    workflow_state = await workflow_engine.initialize_workflow(task, plan)
    assert workflow_state.plan == plan

    # Get the next step to execute
    next_step = await workflow_engine.get_next_step(task.id)
    assert (next_step.step_index, next_step.action, next_step.state) == (0, "fetch_data", StepState.PENDING)

    # Execute the step and update its state. The example does both this and what follows; a step is one of them
    if not step_failed:
        result = await execute_step(next_step)
        await workflow_engine.update_step_state(
            task_id=task.id,
            step_index=next_step.step_index,
            new_step_state=StepState.COMPLETED,
            result=result,
        )

    # If a step fails, handle the failure
    if step_failed:
        error = {"message": "Step execution failed", "reason": "Data validation error"}
        await workflow_engine.handle_step_failure(task.id, next_step.step_index, error)

    # When workflow completes
    final_output = {"result": "analysis_complete", "findings": [1, 2]}
    if not step_failed:
        await workflow_engine.complete_workflow(task.id, final_output)

    state = await workflow_engine.load_workflow_state(task.id)
    assert state.is_finished()
    if step_failed:
        assert (state.status, state.error["message"]) == (TaskState.FAILED, "Step execution failed")
        with pytest.raises(WorkflowError):
            await workflow_engine.complete_workflow(task.id, final_output)
    else:
        assert (state.status, state.workflow_context["final_output"]) == (TaskState.COMPLETED, final_output)
        assert state.steps[0].result == {"action": "fetch_data", "args": {"source": "database"}}
        assert [step.state for step in state.steps[1:]] == [StepState.SKIPPED] * 2, "the example never began them"
    assert await workflow_engine.get_next_step(task.id) is None


async def test_workflow_engine_interface():
    """The methods of its table that the example does not call."""
    workflow_engine = WorkflowEngine(MemoryManager())
    task = BaseTask(id="t", type="data_processing", input={})
    state = await workflow_engine.initialize_workflow(task, PLAN)
    state.workflow_context["seen"] = [1]
    await workflow_engine.save_workflow_state(state)
    await workflow_engine.fail_workflow("t", {"message": "given up"})
    state = await workflow_engine.load_workflow_state("t")
    assert (state.status, state.error, state.workflow_context) == (
        TaskState.FAILED,
        {"message": "given up"},
        {"seen": [1]},
    )
    with pytest.raises(TypeError, match="memory_manager must be a MemoryManager"):
        WorkflowEngine("memory")


async def test_worker_manager_example():
    # Initialize the worker manager
    worker_pool = QueueWorkerPool("processing_pool")
    worker_manager = WorkerManager(
        worker_pool=worker_pool,
        monitor_interval=15,  # Check every 15 seconds
        scale_check_interval=60,  # Evaluate scaling every 60 seconds
    )

    # Start the worker manager
    await worker_manager.start()

    # It has looked at the pool, and can be asked for a recommendation before its time
    assert worker_manager.last_sample.running == 0
    assert worker_manager.evaluate().recommended >= 1

    # Stop the worker manager when done
    await worker_manager.stop()
    assert not worker_manager.running


# -- Usage Examples


async def test_basic_task_processing_pipeline(agents):
    seen = []

    @agents.agent("text_processing")
    async def process(task):
        seen.append(task.id)

    # Initialize components
    task_queue = RedisStreamTaskQueue("task_stream", "processor_group")
    scheduler = PriorityScheduler()
    worker_pool = QueueWorkerPool("processor_pool")
    flow_controller = RedisRateLimiter("processor_flow")
    load_balancer = create_load_balancer("round_robin")

    # Create dispatcher
    dispatcher = Dispatcher(
        task_queue=task_queue,
        scheduler=scheduler,
        worker_pool=worker_pool,
        flow_controller=flow_controller,
        load_balancer=load_balancer,
    )

    # Start the dispatcher: as a task, because run() returns only after stop()
    running = asyncio.create_task(dispatcher.run())

    # Produce tasks with different priorities
    for i in range(10):
        priority = random.choice(
            [
                TaskPriority.LOW,
                TaskPriority.NORMAL,
                TaskPriority.HIGH,
                TaskPriority.CRITICAL,
            ]
        )

        task_data = {
            "id": f"task-{i}",
            "type": "text_processing",
            "input": {"text": f"Sample text {i}"},
            "priority": priority.value,
        }

        await task_queue.produce(task_data)

    # Wait for tasks to be processed: as long as it takes, not 30 s
    await drained(task_queue)

    # Stop the dispatcher
    await dispatcher.stop()

    await running
    assert sorted(seen) == [f"task-{i}" for i in range(10)]
    await worker_pool.shutdown()
    await task_queue.close()


@pytest.mark.parametrize("works", [True, False])
async def test_multi_step_workflow_execution(agents, capsys, works):
    @agents.agent("planner")
    async def plan(task):
        return [{"action": "download"}, {"action": "analyse", "args": {"how": "semantic"}}]

    @agents.agent("download")
    async def download(task):
        return {"bytes": 7, "from": task.input["document_url"]}

    @agents.agent("analyse")
    async def analyse(task):
        if not works:
            raise ValueError("unreadable")
        return {"pages": task.metadata["context"]["results"][0]["bytes"]}

    # Initialize components
    memory_manager = MemoryManager()
    workflow_engine = WorkflowEngine(memory_manager)
    task_queue = RedisStreamTaskQueue("workflow_stream", "workflow_group")
    worker_pool = QueueWorkerPool("workflow_pool")

    # Create orchestrator
    orchestrator = Orchestrator(
        task_queue=task_queue,
        memory_manager=memory_manager,
        worker_pool=worker_pool,
    )

    # Define a complex task with a multi-step workflow
    task_data = {
        "id": "workflow-task-123",
        "type": "document_processing",
        "input": {
            "document_url": "https://example.com/doc.pdf",
            "analysis_type": "semantic",
        },
    }

    # Process the task (this will generate and execute a plan)
    await orchestrator.process_incoming_task("workflow-task-123", task_data)

    # Check workflow state periodically
    while True:
        workflow_state = await workflow_engine.load_workflow_state("workflow-task-123")

        if workflow_state.is_finished():
            print(f"Workflow completed with status: {workflow_state.status.value}")

            if workflow_state.status == TaskState.COMPLETED:
                print(f"Final output: {workflow_state.workflow_context.get('final_output')}")
            else:
                print(f"Error: {workflow_state.error}")

            break

        print(f"Workflow in progress. Step: {workflow_state.current_step_index}/{len(workflow_state.plan)}")
        await asyncio.sleep(0.01)

    said = capsys.readouterr().out
    if works:
        assert said == "Workflow completed with status: completed\nFinal output: {'pages': 7}\n"
    else:
        assert said.startswith("Workflow completed with status: failed\nError: {")
        assert "unreadable" in said
    await worker_pool.shutdown()
    await task_queue.close()


async def test_rate_limited_api_with_backpressure(capsys):
    # Initialize rate limiter
    config = BackpressureConfig(
        rate_limit=RateLimitConfig(rate=10.0, burst=5),
    )
    rate_limiter = RedisRateLimiter("api_limiter", config)

    # Simulate API requests
    async def make_request(request_id):
        try:
            async with rate_limiter:
                print(f"Processing request {request_id}")
                await asyncio.sleep(0.01)  # Simulate work
                return {"id": request_id, "status": "success"}
        except BackpressureRejectedError:
            print(f"Request {request_id} rejected due to rate limiting")
            return {"id": request_id, "status": "rejected"}

    # Send multiple requests simultaneously
    tasks = [make_request(i) for i in range(20)]
    results = await asyncio.gather(*tasks)

    # Count successes and rejections
    successes = sum(1 for r in results if r["status"] == "success")
    rejections = sum(1 for r in results if r["status"] == "rejected")

    print(f"Processed {successes} requests successfully")
    print(f"Rejected {rejections} requests due to rate limiting")

    assert (successes, rejections) == (5, 15)
    assert capsys.readouterr().out.endswith(
        "Processed 5 requests successfully\nRejected 15 requests due to rate limiting\n"
    )


async def test_resilient_task_processing_with_retries():
    dice, failures = random.Random(7), Counter()

    # Simulate a flaky service; the ninth task fails for ever, so that the dead letters are not empty
    async def flaky_service(task_id, fail_rate=0.3):
        if dice.random() < fail_rate or task_id == "resilient-task-9":
            failures[task_id] += 1
            raise Exception(f"Service error for task {task_id}")
        return {"task_id": task_id, "result": "success"}

    # Initialize components
    task_queue = RedisStreamTaskQueue("resilient_stream", "resilient_group")
    worker_pool = QueueWorkerPool("resilient_pool")

    # Create a custom processor function
    async def process_with_retries(message_id, task_data):
        task_id = task_data.get("id", "unknown")
        max_retries = 3
        retry_count = 0

        while retry_count <= max_retries:
            try:
                print(f"Processing task {task_id}, attempt {retry_count + 1}")
                await flaky_service(task_id)
                print(f"Task {task_id} processed successfully")

                # Acknowledge successful processing
                await task_queue.acknowledge(message_id)
                return True
            except Exception as e:
                retry_count += 1
                if retry_count <= max_retries:
                    delay = 0.005 * (2 ** (retry_count - 1))  # Exponential backoff
                    print(f"Task {task_id} failed, retrying in {delay:.3f}s. Error: {e}")
                    await asyncio.sleep(delay)
                else:
                    print(f"Task {task_id} failed after {max_retries} retries. Moving to DLQ.")
                    error_info = {"error": str(e), "attempts": retry_count}
                    await task_queue.add_to_dlq(message_id, task_data, error_info)
                    return False

    # Consumer loop
    async def consumer_loop():
        while True:
            tasks = await task_queue.consume("resilient_consumer", count=5, block_ms=1000)

            if not tasks:
                await asyncio.sleep(0.1)
                continue

            for message_id, task_data in tasks:
                # Submit task processing to worker pool. The example's lambda looks its two names up when it runs, after
                # the loop has gone on: five jobs would process the last of five tasks. Hence the arguments.
                await worker_pool.submit(
                    lambda message_id=message_id, task_data=task_data: process_with_retries(message_id, task_data)
                )

    # Start consumer
    consumer_task = asyncio.create_task(consumer_loop())

    # Produce some tasks
    for i in range(10):
        task_data = {"id": f"resilient-task-{i}", "type": "service_call"}
        await task_queue.produce(task_data)

    # Let things process: until they are, not 30 s
    stats = await drained(task_queue)

    # Cancel consumer
    consumer_task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer_task

    letters = {letter.task_data["id"]: letter for letter in await task_queue.read_dlq()}
    assert set(letters) == {task_id for task_id, count in failures.items() if count == 4}
    assert letters["resilient-task-9"].attempts == 4
    assert letters["resilient-task-9"].error_info["error"] == "Service error for task resilient-task-9"
    assert stats.counters["completed"] == 10 - len(letters)
    await worker_pool.shutdown()
    await task_queue.close()


# -- Integration Guidelines


async def test_integration_guidelines(agents, capsys):
    """Initialization sequence, start and shutdown procedure, in one piece."""
    seen = []

    @agents.agent("work")
    async def work(task):
        seen.append(task.id)
        return task.input

    # Initialize Redis connection manager
    connection_manager = get_connection_manager()

    # Initialize memory manager
    memory_manager = await get_memory_manager()

    # Initialize task queue
    task_queue = RedisStreamTaskQueue(
        stream_name="tasks",
        consumer_group="processor_group",
    )

    # Initialize worker pool
    worker_pool = QueueWorkerPool("processor_pool")

    # Initialize flow controller
    flow_controller = await get_flow_controller("processor_flow")

    # Initialize load balancer
    load_balancer = create_load_balancer("weighted_round_robin")

    # Initialize scheduler
    scheduler = await get_scheduler("priority")

    # Initialize dispatcher
    dispatcher = Dispatcher(
        task_queue=task_queue,
        scheduler=scheduler,
        worker_pool=worker_pool,
        flow_controller=flow_controller,
        load_balancer=load_balancer,
    )

    # Initialize orchestrator
    orchestrator = await get_orchestrator(
        task_queue=task_queue,
        memory_manager=memory_manager,
        worker_pool=worker_pool,
    )

    # Initialize workflow engine
    workflow_engine = await get_workflow_engine(memory_manager)

    # Start the dispatcher
    dispatcher_task = asyncio.create_task(dispatcher.run())

    # Start the worker manager
    worker_manager = WorkerManager(worker_pool)
    await worker_manager.start()

    # Operation: process tasks and workflows, monitor resource utilization
    await task_queue.produce({"id": "t1", "type": "work", "input": {"n": 1}})
    await orchestrator.process_incoming_task("w1", {"type": "work", "input": {"n": 2}})
    state = await workflow_engine.load_workflow_state("w1")
    assert state.workflow_context["final_output"] == {"n": 2}
    await drained(task_queue)
    assert sorted(seen) == ["t1", f"w1:0:{state.task['life']}"]
    assert (await worker_manager.sample()).depth is None

    # Stop accepting new tasks
    print("Stopping services...")

    # Stop the worker manager
    await worker_manager.stop()
    print("Worker manager stopped")

    # Stop the dispatcher
    await dispatcher.stop()
    print("Dispatcher stopped")

    # Shutdown the worker pool
    await worker_pool.shutdown(wait=True, timeout=30.0)
    print("Worker pool shutdown")

    # Close Redis connections
    await connection_manager.close()
    print("Redis connections closed")

    print("System shutdown complete")

    async with asyncio.timeout(2):
        await dispatcher_task
    assert capsys.readouterr().out.splitlines()[-1] == "System shutdown complete"
    assert not connection_manager.connected
    assert not [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("orchestra")]


# -- every get_*() in both spellings


@pytest.mark.parametrize(
    "get",
    [
        get_connection_manager,
        get_memory_manager,
        lambda: get_flow_controller("a"),
        get_scheduler,
        lambda: get_scheduler("priority"),
        get_orchestrator,
        get_workflow_engine,
        lambda: get_workflow_engine(get_memory_manager()),
    ],
    ids=[
        "connections",
        "memory",
        "flow",
        "scheduler",
        "scheduler by name",
        "orchestrator",
        "engine",
        "engine of memory",
    ],
)
async def test_both_spellings_give_the_same_object(get):
    plain = get()
    awaited = await get()
    assert awaited is plain
    assert await plain is plain
    assert get() is plain


async def test_awaiting_connects():
    manager = get_connection_manager()
    assert not manager.connected
    assert (await get_connection_manager()).connected
    assert manager.connected


async def test_names_tell_shared_objects_apart():
    assert get_flow_controller("a") is not get_flow_controller("b")
    assert get_scheduler("a") is not get_scheduler("b")
    assert get_scheduler() is get_scheduler("priority")
    assert get_memory_manager("a") is not get_memory_manager("b")
